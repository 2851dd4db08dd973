"""Copies of far-away shards in a local folder of bounded size (object store -> shards).

A folder serves all ranks and runs of a host, and needs no process that looks after it:

* a copy is named by its SHA-256 and gets that name only when its content has it;
* what is being fetched is ``<sha256>.part``, locked by who fetches it. The lock dies with its
  holder, so what a killed process left is taken over or removed, and nothing is fetched twice;
* room is made before a fetch, under the folder's lock, and held by the size of the ``.part``;
* who reads keeps the file open, so a copy may be removed at any time.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import fsspec

from alignrec.data.config import ShardsConfig
from alignrec.data.shard_file import ShardFile, mark_used
from alignrec.errors import StageFailure, UserError

_COPY, _PART, _LOCK = ".tar", ".part", ".lock"
_CHUNK_BYTES = 4 * 2**20
_ATTEMPTS = 4
_MOST_DAMAGED = 2  # a fetch that is damaged twice is damaged where it comes from
# With what another process fetches while nothing comes; less than peers and watchdogs have.
_PATIENCE_SECONDS = 120.0
_POLL_SECONDS = 0.02
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
_SHARE_AHEAD = 0.7  # of the cache for what is fetched ahead; the rest is for what is being read


class ShardCache:
    """Opens shards of a root that fsspec reads, through copies of at most ``cache_bytes``."""

    keep_fresh = True

    def __init__(
        self,
        config: ShardsConfig,
        shards: Iterable[ShardFile],
        *,
        verify: bool,
        num_readers: int = 1,
        pause_seconds: float = 1.0,
    ) -> None:
        """Prepare the folder.

        Args:
            config: root, folder and size; the root must be set.
            shards: all shards that may be asked for.
            verify: compare a copy that another process made with its SHA-256 when this one first
                opens it; not needed where every sample has a checksum of its own.
            num_readers: processes that share the folder and read different shards at a time;
                those that read the same ones count as one.
            pause_seconds: before the second attempt of a fetch; doubled before each further one.

        Raises:
            UserError: a root that fsspec cannot read, a folder that cannot be written, or a shard
                larger than the cache.
        """
        self._root = (config.root or "").rstrip("/")
        self._folder = config.folder
        self.max_bytes = config.cache_bytes
        self._verify = verify
        self._num_readers = num_readers
        self._pause_seconds = pause_seconds
        self._verified: set[str] = set()
        self._needed: frozenset[Path] = frozenset()
        self._failures: dict[str, str] = {}  # by SHA-256; no second round of attempts
        self._check_largest(shards)
        try:
            self._files, self._base = fsspec.core.url_to_fs(self._root)
        except (ImportError, ValueError, OSError) as error:
            raise UserError(
                f"shards.root={self._root} cannot be read ({error}). Correct it, or install "
                f"fsspec's package for it."
            ) from error
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / _LOCK).touch()
        except OSError as error:
            raise UserError(
                f"shards.cache_folder={self._folder} cannot be written ({error.strerror}), so "
                f"shards from {self._root} have no place. Name another folder."
            ) from error

    @property
    def ahead_bytes(self) -> int:
        """Bytes of shards that may be fetched before they are read."""
        return int(self.max_bytes * _SHARE_AHEAD / self._num_readers)

    def open(self, shard: ShardFile) -> int:
        """Return a descriptor of a copy, which the caller closes.

        Raises:
            StageFailure: it cannot be fetched, or is damaged where it comes from.
        """
        progress, since = 0, time.monotonic()
        while time.monotonic() - since < _PATIENCE_SECONDS:
            for attempt in (self._open_copy, self._fetch):
                if (descriptor := attempt(shard)) is not None:
                    return descriptor
            if (found := self._last_write(shard)) != progress:
                progress, since = found, time.monotonic()
            time.sleep(_POLL_SECONDS)  # another process is at it, or has taken all the room
        raise StageFailure(
            f"shard {self._url(shard)}: another process has held {self._part(shard)} or all of "
            f"shards.cache_bytes={self.max_bytes} for {_PATIENCE_SECONDS:.0f} s in which nothing "
            f"came. Look for hanging processes on this host, or give the run a "
            f"shards.cache_folder of its own."
        )

    def recheck(self, shard: ShardFile) -> None:
        """Remove a copy that is not what its name says: the disk's or somebody's doing."""
        with contextlib.suppress(FileNotFoundError):
            with self._copy(shard).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                self._copy(shard).unlink(missing_ok=True)

    def expect(self, shards: Iterable[ShardFile]) -> None:
        """Take note of what will be opened: it makes room last, and is worth fetching ahead."""
        self._needed = frozenset(self._copy(shard) for shard in shards)
        now = time.time_ns()
        for copy in self._needed:  # another process makes room by what was not used for longest
            with contextlib.suppress(OSError):
                os.utime(copy, ns=(now, now))

    def prefetch(self, shard: ShardFile) -> None:
        """Make a copy, unless that is done, in other hands, not needed any more or too much."""
        if not self._copy(shard).exists():
            descriptor = self._fetch(shard, ahead=True)
            if descriptor is not None:
                os.close(descriptor)

    def damaged(self, shard: ShardFile, fault: str) -> StageFailure:
        """Return what to raise when a shard is not what the tables say."""
        return StageFailure(
            f"shard {self._url(shard)}: {fault}, so the samples in it cannot be trusted. Copy the "
            f"dataset's shards there again."
        )

    def _check_largest(self, shards: Iterable[ShardFile]) -> None:
        largest = max((shard.num_bytes for shard in shards), default=0)
        if largest > self.max_bytes:
            raise UserError(
                f"shards.cache_bytes={self.max_bytes} is less than the largest shard, "
                f"{largest} bytes, so it could never be read. Raise it to several times that."
            )

    def _open_copy(self, shard: ShardFile) -> int | None:
        if self._verify and shard.sha256 not in self._verified:
            self.recheck(shard)
        try:
            descriptor = os.open(self._copy(shard), os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        self._verified.add(shard.sha256)
        mark_used(descriptor)
        return descriptor

    def _fetch(self, shard: ShardFile, *, ahead: bool = False) -> int | None:
        """Make a copy and return its descriptor; None when it is not for this process to do."""
        if fault := self._failures.get(shard.sha256):
            raise StageFailure(fault)
        descriptor = self._begin(shard, ahead=ahead)
        if descriptor is None:
            return None
        try:
            self._fill(descriptor, shard)
            mark_used(descriptor)
            with self._locked():  # who makes room sees one of the two names
                self._part(shard).replace(self._copy(shard))
        except BaseException as error:
            if isinstance(error, StageFailure):
                self._failures[shard.sha256] = str(error)
            self._part(shard).unlink(missing_ok=True)
            os.close(descriptor)
            raise
        fcntl.flock(descriptor, fcntl.LOCK_UN)
        self._verified.add(shard.sha256)
        return descriptor

    def _begin(self, shard: ShardFile, *, ahead: bool) -> int | None:
        """Lock a new part with room for the shard; None where that is done or cannot be."""
        part, copy = self._part(shard), self._copy(shard)
        with self._locked():
            if copy.exists() or (ahead and copy not in self._needed):  # read and removed by now
                return None
            descriptor = os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            if not _take(descriptor, part):
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, 0)  # what a killed process left is not counted twice
            if not self._make_room(shard.num_bytes):
                part.unlink(missing_ok=True)
                os.close(descriptor)
                return None
            os.ftruncate(descriptor, shard.num_bytes)  # holds the room
            return descriptor

    def _make_room(self, num_bytes: int) -> bool:
        """Remove copies, needed ones last, the longest unused first; say whether that suffices."""
        parts = [path for path in self._folder.glob(f"*{_PART}") if not _is_left(path)]
        copies = sorted(
            _sizes(self._folder.glob(f"*{_COPY}")), key=lambda e: (e[2] in self._needed, *e)
        )
        over = sum(size for _, size, _ in (*copies, *_sizes(parts))) + num_bytes - self.max_bytes
        for _, size, path in copies:
            if over <= 0:
                break
            path.unlink(missing_ok=True)
            over -= size
        return over <= 0

    def _last_write(self, shard: ShardFile) -> int:
        """Return when (ns) the shard's part last grew, or any that takes its room."""
        with self._locked():  # no part comes and goes that only asked for room
            part = self._part(shard)
            parts = [part] if part.exists() else self._folder.glob(f"*{_PART}")
            return max((used for used, _, _ in _sizes(parts)), default=0)

    def _fill(self, descriptor: int, shard: ShardFile) -> None:
        """Fetch a shard's bytes, again after a failure or when they are damaged."""
        num_damaged, fault = 0, ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(self._pause_seconds * 2 ** (attempt - 1))
                mark_used(descriptor)  # who waits for it sees that it goes on
            try:
                found = self._transfer(descriptor, shard)
            except StageFailure:
                raise
            except FileNotFoundError:
                fault = "it is not there"
                break
            except Exception as error:  # a remote file system raises what it likes
                fault = f"{type(error).__name__}: {error} (attempt {attempt + 1} of {_ATTEMPTS})"
                continue
            if found == shard.sha256:
                return
            num_damaged, fault = num_damaged + 1, "its checksum differs from the manifest"
            if num_damaged == _MOST_DAMAGED:
                raise self.damaged(shard, f"{fault}, twice")
        raise StageFailure(
            f"shard {self._url(shard)}: {_shown(fault)}, so its samples cannot be read. Correct "
            f"shards.root or the rights to it, and run the same command again: it resumes."
        )

    def _transfer(self, descriptor: int, shard: ShardFile) -> str:
        """Copy the bytes once; returns their SHA-256."""
        digest, left = hashlib.sha256(), shard.num_bytes
        os.lseek(descriptor, 0, os.SEEK_SET)
        with self._files.open(f"{self._base}/{shard.name}", "rb") as source:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                left -= len(chunk)
                if left < 0:  # not the shard of the manifest, and more than there is room for
                    break
                self._write(descriptor, chunk)
        return digest.hexdigest()

    def _write(self, descriptor: int, chunk: bytes) -> None:
        view = memoryview(chunk)
        try:
            while view:
                view = view[os.write(descriptor, view) :]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            raise StageFailure(
                f"shards.cache_folder={self._folder} cannot be written ({error.strerror}), though "
                f"shards.cache_bytes={self.max_bytes} is not used up. Make room or lower it."
            ) from error

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with (self._folder / _LOCK).open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # held for a look at the folder, and freed by a kill
            yield

    def _copy(self, shard: ShardFile) -> Path:
        return self._folder / f"{shard.sha256}{_COPY}"

    def _part(self, shard: ShardFile) -> Path:
        return self._folder / f"{shard.sha256}{_PART}"

    def _url(self, shard: ShardFile) -> str:
        return f"{self._root}/{shard.name}"


def _take(descriptor: int, path: Path) -> bool:
    """Lock a file that was opened at ``path``; False when another has it or it is gone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except (BlockingIOError, FileNotFoundError):
        return False


def _is_left(part: Path) -> bool:
    """Remove what a killed process was fetching; say whether it was that."""
    try:
        with part.open("r+b") as file:
            if not _take(file.fileno(), part):
                return False
            part.unlink(missing_ok=True)
            return True
    except FileNotFoundError:
        return True


def _sizes(paths: Iterable[Path]) -> Iterator[tuple[int, int, Path]]:
    """Yield (time of last use in ns, bytes, path) of the files that are still there."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            status = path.stat()
            yield status.st_mtime_ns, status.st_size, path


def _shown(url: str) -> str:
    """Return a text without what stands before the @ in a URL: it may be a password."""
    return re.sub(r"//[^/@\s]+@", "//", url)
