"""Who makes the next version of a dataset: one run at a time, on any host (preparation only).

The lock is a file in the dataset's folder, with the process that holds it and its time of change
as a heartbeat. Where a holder is dead can be seen on its own host; of another host only the
heartbeat is known.
"""

import contextlib
import datetime
import errno
import fcntl
import getpass
import json
import os
import socket
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from alignrec.errors import StageFailure, UserError

LOCK = "lock"
_GUARD = ".lock.guard"
HEARTBEAT_SECONDS = 15.0
STALE_SECONDS = 120.0
_PASSING_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)
_READ_ATTEMPTS = 5
_READ_PAUSE_SECONDS = 2.0
_NO_ENTRY: dict[str, Any] = {}


class Lock:
    """Holds a folder for the length of a ``with`` block."""

    def __init__(self, root: Path, *, run: str) -> None:
        """Say what is to be held.

        Args:
            root: folder of the versions; it is made if it is not there.
            run: name by which others are told who holds it.
        """
        self._root = root
        self._path = root / LOCK
        self._entry = {
            "token": uuid.uuid4().hex,
            "run": run,
            "user": _user(),
            "host": socket.gethostname(),
            "place": _place(),
            "pid": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="lock", daemon=True)

    def __enter__(self) -> Self:
        """Take the lock.

        Raises:
            StageFailure: another run holds it, or the storage is full or away; later it may do.
            UserError: the folder cannot be written.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with _guarded(self._root) as now:
                self._take(now)
        except OSError as error:
            if error.errno in _PASSING_FAULTS:
                raise StageFailure(
                    f"the lock in {self._root} cannot be written ({error.strerror}). Run the same "
                    f"command again when the storage has room and answers."
                ) from error
            raise UserError(
                f"data_prep.versions.root={self._root} cannot be written ({error.strerror}). "
                f"Choose another folder or correct its rights."
            ) from error
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError), _guarded(self._root):
            if self._is_entry(_read(self._path)):
                self._path.unlink()

    def check(self) -> None:
        """Make sure that no other run took over, thinking this one dead.

        Raises:
            StageFailure: one did, or the lock cannot be read, time after time.
        """
        holder = self._read_patiently()
        if not self._is_entry(holder):
            raise StageFailure(
                f"{self._path} was taken over by {_describe(holder)}: this process showed no sign "
                f"of life for {STALE_SECONDS:.0f} s. Nothing was published; run the same command "
                f"again when that run has ended."
            )

    def _read_patiently(self) -> dict[str, Any] | None:
        for _ in range(_READ_ATTEMPTS - 1):
            with contextlib.suppress(OSError):  # storage that is away for a moment
                return _read(self._path)
            self._ended.wait(_READ_PAUSE_SECONDS)
        try:
            return _read(self._path)
        except OSError as error:
            raise StageFailure(
                f"{self._path} cannot be read ({error.strerror}), so another run may hold it by "
                f"now. Nothing was published; run the same command again when the storage "
                f"answers: it resumes."
            ) from error

    def _take(self, now: float) -> None:
        holder = _read(self._path)
        if holder is not None:
            age = now - self._path.stat().st_mtime
            if not _is_gone(holder, age):
                raise StageFailure(_refusal(self._root, holder, age))
            self._path.unlink()
        spare = self._root / f".{LOCK}.{self._entry['token']}.writing"
        spare.write_text(json.dumps(self._entry), encoding="utf-8")
        try:
            os.link(spare, self._path)  # all of it or nothing, and only if there is none
        except FileExistsError:
            raise StageFailure(_refusal(self._root, _read(self._path) or _NO_ENTRY, 0.0)) from None
        except OSError:  # no hard links here
            with self._path.open("x", encoding="utf-8") as file:
                json.dump(self._entry, file)
        finally:
            spare.unlink(missing_ok=True)

    def _is_entry(self, holder: dict[str, Any] | None) -> bool:
        return (holder or _NO_ENTRY).get("token") == self._entry["token"]

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with contextlib.suppress(OSError):  # storage that is away for a moment
                if not self._is_entry(_read(self._path)):
                    return
                os.utime(self._path)


def _is_gone(holder: dict[str, Any], age: float) -> bool:
    if holder.get("place") == _place():
        start = _process_start(int(holder["pid"]))
        return start is None or start != holder["process_start"]
    return age > STALE_SECONDS


def _refusal(root: Path, holder: dict[str, Any], age: float) -> str:
    advice = "Wait for it or stop it."
    if holder.get("place") != _place():
        advice += (
            f" If it is dead, its lock is taken over {STALE_SECONDS:.0f} s after its last sign of "
            f"life, which was {max(age, 0):.0f} s ago."
        )
    return (
        f"{root} is in use by {_describe(holder)}: two runs at once would give one number to two "
        f"items. {advice}"
    )


def _describe(holder: dict[str, Any] | None) -> str:
    if not holder:
        return "a run that did not say its name"
    return (
        f"the run {holder.get('run')} (process {holder.get('pid')} of {holder.get('user')} on "
        f"{holder.get('host')}, since {holder.get('started')})"
    )


def _read(path: Path) -> dict[str, Any] | None:
    """Return the entry of a lock, an empty one where it is torn, None where there is none.

    Raises:
        OSError: it cannot be read, which says nothing of who holds it.
    """
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return _NO_ENTRY
    return entry if isinstance(entry, dict) else _NO_ENTRY


@contextlib.contextmanager
def _guarded(root: Path) -> Iterator[float]:
    """Let one process at a time look at the lock and change it; yield the storage's own time."""
    with (root / _GUARD).open("a") as file:
        with contextlib.suppress(OSError):  # storage without flock: the lock itself is exclusive
            fcntl.flock(file, fcntl.LOCK_EX)
        os.utime(root / _GUARD)
        yield (root / _GUARD).stat().st_mtime


def _place() -> list[str]:
    """Return what two processes share that can see each other by number: host, boot, namespace."""
    found = [socket.gethostname()]
    with contextlib.suppress(OSError):
        found.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        found.append(str(Path("/proc/self/ns/pid").readlink()))
    return found


def _process_start(pid: int) -> str | None:
    """Return when a process began, in the system's own unit; None when there is no such process.

    A number is given again to a later process, but not together with this.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    with contextlib.suppress(OSError, IndexError):
        # The name in field 2 may hold spaces and brackets: count behind its end.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
