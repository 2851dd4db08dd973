"""A folder that one process at a time may use (runs, schedule servers -> disk)."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from alignrec.errors import StageFailure

_ATTEMPTS = 4
_PAUSE_SECONDS = 0.02


@contextlib.contextmanager
def held(path: Path, *, refusal: Callable[[str], str]) -> Iterator[None]:
    """Hold a lock for the length of the block; it ends with the process, however it ends.

    Args:
        path: file of the lock, in a folder that exists.
        refusal: what to tell the second process, made of who the first one is.

    Raises:
        StageFailure: another process holds it; it may be free when this is tried again.
    """
    with path.open("a+", encoding="utf-8") as file:
        if not _taken(file):
            file.seek(0)
            raise StageFailure(refusal(_holder(file.read())))
        file.truncate(0)
        json.dump(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "job": os.environ.get("ALIGNREC_JOB"),
                "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            },
            file,
        )
        file.flush()
        yield


def holder(path: Path) -> str | None:
    """Return who holds a lock; None when nobody does."""
    try:
        file = path.open("r", encoding="utf-8")
    except FileNotFoundError:
        return None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return _holder(file.read())
    return None


def _taken(file: IO[str]) -> bool:
    for _ in range(_ATTEMPTS):  # ``holder`` of another process holds it for a moment
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            time.sleep(_PAUSE_SECONDS)
        else:
            return True
    return False


def _holder(text: str) -> str:
    try:
        owner = json.loads(text)
        job = f" (job {owner['job']})" if owner["job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
