"""The token that Ray asks for, in a file that only this user can read (-> every start of Ray)."""

import contextlib
import os
import secrets
import stat
from pathlib import Path

from alignrec.errors import UserError

_MODE = "token"


def ensure_token() -> None:
    """Make a token that only this user can read, unless there is one or none is wanted.

    Ray would make one too when it starts, but readable by everybody on the machine. A file that the
    user chose is left as it is: it may be a mounted secret, or shared with a group.

    Raises:
        UserError: there is none and it cannot be made.
    """
    if os.environ.get("RAY_AUTH_MODE", _MODE).lower() != _MODE or os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = token_path()
    try:
        if not path.exists():
            _make(path)
        elif not os.environ.get("RAY_AUTH_TOKEN_PATH"):
            _close(path)
    except OSError as error:
        raise UserError(
            f"the token of Ray {path} cannot be made or read ({error.strerror}). Give one in "
            f"RAY_AUTH_TOKEN, or its file in RAY_AUTH_TOKEN_PATH."
        ) from error


def _make(path: Path) -> None:
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


def _close(path: Path) -> None:
    """Take the rights of everybody else, where they have any and we may."""
    if path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO):
        with contextlib.suppress(OSError):
            path.chmod(0o600)


def token_path() -> Path:
    """Return the file that Ray reads the token from."""
    chosen = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return Path(chosen) if chosen else Path.home() / ".ray" / "auth_token"
