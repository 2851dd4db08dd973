"""One shard as the manifest lists it, and where shards can be opened (manifest -> shards)."""

import contextlib
import dataclasses
import hashlib
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from alignrec import artifacts
from alignrec.errors import StageFailure, UserError

_NAME = re.compile(r"shards/\w[\w.-]*", re.ASCII)
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class ShardFile:
    """A shard: its path in the dataset, size in bytes and SHA-256 in hex digits."""

    name: str
    num_bytes: int
    sha256: str


class ShardSource(Protocol):
    """Where shards come from; used from several threads at once.

    Attributes:
        keep_fresh: whether the time of a file's last use matters to who made it.
    """

    keep_fresh: bool

    @property
    def ahead_bytes(self) -> int:
        """Bytes of shards that may be fetched before they are read; 0: nothing is fetched."""
        ...

    def open(self, shard: ShardFile) -> int:
        """Return a descriptor of the shard, which the caller closes.

        Raises:
            StageFailure: it is missing, or damaged as far as that is looked at.
        """
        ...

    def recheck(self, shard: ShardFile) -> None:
        """Do what helps against damage found in an open shard, before it is opened again."""
        ...

    def expect(self, shards: Iterable[ShardFile]) -> None:
        """Take note of all shards that will be opened soon."""
        ...

    def prefetch(self, shard: ShardFile) -> None:
        """Bring an expected shard near, if that is not done yet."""
        ...

    def damaged(self, shard: ShardFile, fault: str) -> StageFailure:
        """Return what to raise when a shard is not what the tables say."""
        ...


class LocalShards:
    """Shards in the dataset's own folder."""

    keep_fresh = False
    ahead_bytes = 0

    def __init__(self, dataset: Path, *, verify: bool) -> None:
        """Keep where they are.

        Args:
            dataset: its folder.
            verify: compare a shard with its SHA-256 when this process first opens it; not needed
                where every sample has a checksum of its own.
        """
        self._dataset = dataset
        self._verify = verify
        self._verified: set[str] = set()

    def open(self, shard: ShardFile) -> int:
        """Return a descriptor of the shard, which the caller closes."""
        try:
            descriptor = os.open(self._dataset / shard.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise self.damaged(shard, error.strerror or "unreadable") from error
        if self._verify and shard.name not in self._verified:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                os.close(descriptor)
                raise self.damaged(shard, "its checksum differs from the manifest")
            self._verified.add(shard.name)
        return descriptor

    def recheck(self, shard: ShardFile) -> None:
        """Do nothing: there is no other copy."""

    def expect(self, shards: Iterable[ShardFile]) -> None:
        """Do nothing: they are near."""

    def prefetch(self, shard: ShardFile) -> None:
        """Do nothing: it is near."""

    def damaged(self, shard: ShardFile, fault: str) -> StageFailure:
        """Return what to raise when a shard is not what the tables say."""
        return StageFailure(
            f"shard {self._dataset / shard.name}: {fault}, so the samples in it cannot be trusted. "
            f"Delete {self._dataset} and run data_prep again."
        )


def mark_used(descriptor: int) -> None:
    """Set a file's time to now: the kernel's own stamps are too coarse to tell what came first."""
    now = time.time_ns()
    with contextlib.suppress(OSError):  # another user's file keeps its time
        os.utime(descriptor, ns=(now, now))


def shard_files(dataset: Path, names: tuple[str, ...]) -> tuple[ShardFile, ...]:
    """Return what a dataset's manifest says of its shards.

    Raises:
        UserError: what the tables and the manifest say is no shard's name, size or SHA-256. They
            become paths, and may come from elsewhere.
    """
    files = artifacts.read(dataset).files
    return tuple(_shard_file(dataset, name, files.get(name, {})) for name in names)


def _shard_file(dataset: Path, name: str, entry: Mapping[str, Any]) -> ShardFile:
    sha256, num_bytes = entry.get("sha256"), entry.get("bytes")
    if (
        isinstance(sha256, str)
        and isinstance(num_bytes, int)
        and num_bytes >= 0
        and _SHA256.fullmatch(sha256)
        and _NAME.fullmatch(name)
    ):
        return ShardFile(name, num_bytes, sha256)
    raise UserError(
        f"{dataset}: the shard {name!r}, bytes={num_bytes!r}, sha256={sha256!r} in its manifest "
        f"and samples.parquet is not shards/<name> with a size and a SHA-256, so nothing is read "
        f"from there. Delete {dataset} and run data_prep again."
    )
