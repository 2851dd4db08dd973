"""The token that Ray asks for, in a file that only this user can read (-> every start of Ray)."""

import os
import secrets
from pathlib import Path

_MODE = "token"


def ensure_token() -> None:
    """Make a token that only this user can read, unless there is one or none is wanted.

    Ray would make one too when it starts, but readable by everybody on the machine.
    """
    if os.environ.get("RAY_AUTH_MODE", _MODE).lower() != _MODE or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    if path.exists():
        if path.stat().st_uid == os.getuid():
            path.chmod(0o600)
        return
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    spare = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(spare, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(spare, path)
    except FileExistsError:
        pass  # another command was faster: its token holds
    finally:
        spare.unlink()


def token_path() -> Path:
    """Return the file that Ray reads the token from."""
    chosen = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(chosen) if chosen else Path.home() / ".ray" / "auth_token"
