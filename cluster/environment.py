"""Environment variables and the token that Ray reads (command line -> every use of Ray)."""

import os
import secrets
from pathlib import Path

TOKEN_MODE = "token"  # noqa: S105 - the name of a mode
_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": TOKEN_MODE,
    # A worker without GPUs would print a warning about a coming change of Ray.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # The run says in its own words that a rank died.
    "RAY_DEDUP_LOGS_SKIP_REGEX": "A worker died or was killed",
    "RAY_DATA_LOG_LEVEL": "WARNING",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Train would turn every print of a rank into a log record, and move it to a folder of its own.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # `launch stop` gives a job this long to end its stage before it is killed.
    "RAY_JOB_STOP_WAIT_TIME_S": "10",
}
_LOOPBACK = {
    # Without it Ray replaces 127.0.0.1 by the machine's address and listens on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Nobody reclaims this machine under a run: one process less.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def prepare(*, loopback: bool) -> None:
    """Set what Ray reads from the environment; call it before ray is imported.

    Args:
        loopback: the Ray is on this machine and listens on 127.0.0.1 only.
    """
    for name, value in (_DEFAULTS | (_LOOPBACK if loopback else {})).items():
        os.environ.setdefault(name, value)
    ensure_token()


def ensure_token() -> None:
    """Make a token that only this user can read, unless there is one or none is wanted.

    Ray would make one too, but readable by everybody on the machine.
    """
    if os.environ.get("RAY_AUTH_MODE") != TOKEN_MODE or os.environ.get("RAY_AUTH_TOKEN"):
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
