"""Environment variables that Ray reads, and its token (command line -> every use of Ray)."""

import contextlib
import os
from collections.abc import Iterator, Mapping

from alignrec.ray_token import ensure_token

_DEFAULTS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",
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


@contextlib.contextmanager
def changed(variables: Mapping[str, str | None]) -> Iterator[None]:
    """Have environment variables for the length of the block; None hides one."""
    before = {name: os.environ.get(name) for name in variables}
    _put(variables)
    try:
        yield
    finally:
        _put(before)


def _put(variables: Mapping[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
