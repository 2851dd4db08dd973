"""Payload bytes of single samples from a dataset's shards (dataset -> loader).

A sample's bytes are read at the offsets in ``samples.parquet``, so any sample costs one or two
reads and nothing is unpacked. What is read is checked against the sample's checksum; in datasets
without these, every shard against the manifest when it is first opened.
"""

import concurrent.futures
import dataclasses
import json
import math
import os
import resource
import threading
import time
import zlib
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alignrec.data import schema
from alignrec.data.config import ShardsConfig
from alignrec.data.shard_cache import ShardCache
from alignrec.data.shard_file import LocalShards, ShardFile, ShardSource, mark_used, shard_files
from alignrec.errors import UserError

Ints = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.unsignedinteger[Any]]
B = TypeVar("B")

_MAX_OPEN_SHARDS = 4096  # more than a window touches, where the host allows as many open files
_FRESH_SECONDS = 1.0  # how precisely the cache knows what was used last, and we what it removed
_IDLE_SECONDS = 1.0  # a removed copy that is still being read would be fetched again
_FETCHES_AT_ONCE = 4
# What reading a sample raises where its shard is not what the tables say, or its storage fails.
_FAULTS = (EOFError, OSError, ValueError, KeyError, TypeError)
# Batches that are looked at before they are read.
_AHEAD_AT_FIRST, _AHEAD_GROWTH, _MOST_AHEAD = 8, 3, 16_384


@dataclasses.dataclass(frozen=True)
class RawSample:
    """One item as it lies in its shard; ``image`` is empty where there is no picture."""

    item_index: int
    image: bytes
    text: str


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """Where each sample lies; row r is the r-th sample of the dataset in item_index order.

    Every rank has it whole, so its numbers are as narrow as they fit: at most 26 bytes a sample
    where shards are smaller than 4 GiB.

    Attributes:
        item_index: of each sample, ascending.
        shard_names: paths of the shards in the dataset.
        shard: where in ``shard_names`` each sample's shard is.
        image_offset: bytes before the picture in the shard.
        image_bytes: size of the picture; 0 without one.
        json_offset: bytes before the JSON in the shard.
        json_bytes: size of the JSON.
        crc32: of the picture's bytes followed by the JSON's; None in older datasets.
    """

    item_index: Unsigned
    shard_names: tuple[str, ...]
    shard: Unsigned
    image_offset: Unsigned
    image_bytes: Unsigned
    json_offset: Unsigned
    json_bytes: Unsigned
    crc32: Unsigned | None

    @classmethod
    def read(cls, dataset: Path) -> "SampleTable":
        """Read a dataset's ``samples.parquet``.

        Raises:
            UserError: the dataset has neither pictures nor texts.
        """
        shards = schema.read_samples(dataset, ["shard"])["shard"]
        if len(shards) == 0:
            raise UserError(
                f"{dataset} has no samples (no pictures, no texts), so there is nothing to encode. "
                f"Import features instead (features.files), and leave the pretrain section out."
            )
        encoded = shards.unify_dictionaries().combine_chunks()
        names = ("item_index", "image_offset", "image_bytes", "json_offset", "json_bytes")
        with_checksums = schema.have_checksums(dataset)
        # a column at a time, so that no more than one is there at its full width
        numbers = {name: _narrow(schema.read_samples(dataset, [name])[name]) for name in names}
        crc32 = schema.read_samples(dataset, ["crc32"])["crc32"] if with_checksums else None
        return cls(
            shard_names=tuple(encoded.dictionary.to_pylist()),
            shard=_narrow(encoded.indices),
            crc32=None if crc32 is None else _narrow(crc32),
            **numbers,
        )

    def __len__(self) -> int:
        return len(self.item_index)


class ShardReader:
    """Reads samples by row number; safe to use from several threads."""

    def __init__(self, table: SampleTable, files: Sequence[ShardFile], source: ShardSource) -> None:
        """Keep what to read.

        Args:
            table: where each sample lies.
            files: the shards in the order of ``table.shard_names``.
            source: opens them.
        """
        self._table = table
        self._files = files
        self._source = source
        self._open: OrderedDict[int, concurrent.futures.Future[_OpenShard]] = OrderedDict()
        self._max_open = _max_open_shards()
        self._lock = threading.Lock()
        self._next_look = 0.0

    def read(self, row: int) -> RawSample:
        """Return the sample in row ``row`` of the table.

        Raises:
            StageFailure: the shard is missing, damaged, or does not hold what the table says.
        """
        number = int(self._table.shard[row])
        shard = self._shard(number)
        if self._source.keep_fresh and time.monotonic() > self._next_look:
            self._close_removed()
        try:
            return self._sample(row, shard)
        except _FAULTS:
            self._source.recheck(self._files[number])  # the damage may be this copy's alone
            with self._lock:
                self._open.pop(number, None)
        shard = self._shard(number)
        try:
            return self._sample(row, shard)
        except _FAULTS as error:
            fault = f"sample {self._table.item_index[row]} is unreadable ({error})"
            raise self._source.damaged(self._files[number], fault) from error

    def _sample(self, row: int, shard: "_OpenShard") -> RawSample:
        """Read a sample; raises one of _FAULTS."""
        table = self._table
        image = shard.read(int(table.image_offset[row]), int(table.image_bytes[row]))
        payload = shard.read(int(table.json_offset[row]), int(table.json_bytes[row]))
        if table.crc32 is not None and zlib.crc32(payload, zlib.crc32(image)) != table.crc32[row]:
            raise ValueError("its checksum differs from samples.parquet")
        text = json.loads(payload)["text"] if payload else ""
        return RawSample(int(table.item_index[row]), image, text)

    def fetched_ahead(
        self, batches: Iterable[B], rows: Callable[[B], Ints]
    ) -> Generator[B, None, None]:
        """Yield the batches, while the shards of those that follow are being fetched.

        How far ahead is bounded by the bytes of the shards (``ahead_bytes`` of the source). Only
        far-away shards are fetched: for the others the batches come as they are. Close it when not
        all are taken: it gives up what has not begun.

        Args:
            batches: in the order in which they will be read.
            rows: rows of the sample table that a batch reads.
        """
        if self._source.ahead_bytes == 0:
            yield from batches
            return
        ahead: deque[tuple[B, list[int]]] = deque()
        expected = _Expected(self._files, self._source)
        most = _AHEAD_AT_FIRST
        pool = concurrent.futures.ThreadPoolExecutor(_FETCHES_AT_ONCE, "shards")
        try:
            for batch in batches:
                shards: list[int] = np.unique(self._table.shard[rows(batch)]).tolist()
                for shard in expected.add(shards):
                    pool.submit(self._prefetch, shard)
                ahead.append((batch, shards))
                while ahead and (expected.is_too_much() or len(ahead) > most):
                    first, shards = ahead.popleft()
                    expected.remove(shards)
                    # The look ahead grows as it goes, so that the first batch does not wait for it.
                    most = min(most + _AHEAD_GROWTH, _MOST_AHEAD)
                    yield first
            yield from (batch for batch, _ in ahead)
            pool.shutdown(wait=True)
        finally:  # given up: what has not begun need not be fetched
            pool.shutdown(wait=True, cancel_futures=True)

    def bytes_of(self, rows: Ints) -> int:
        """Return the size of all shards that hold some of these rows."""
        return sum(self._files[number].num_bytes for number in np.unique(self._table.shard[rows]))

    def close(self) -> None:
        """Close all shards, as soon as nobody reads them."""
        with self._lock:
            self._open.clear()

    def _shard(self, number: int) -> "_OpenShard":
        """Return a shard, opened by the first thread that asks; the others wait for it alone."""
        with self._lock:
            future = self._open.get(number)
            if future is not None:
                self._open.move_to_end(number)
            else:
                mine = self._open[number] = concurrent.futures.Future()
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
        if future is not None:
            try:
                return future.result()
            finally:
                del future  # an error, its frames and a future that holds it would be a cycle
        try:
            descriptor = self._source.open(self._files[number])
        except BaseException as error:
            with self._lock:
                self._open.pop(number, None)
            mine.set_exception(error)
            del mine  # as above
            raise
        shard = _OpenShard(descriptor, keep_fresh=self._source.keep_fresh)
        mine.set_result(shard)
        if self._source.keep_fresh:
            self._close_removed()
        return shard

    def _prefetch(self, shard: ShardFile) -> None:
        self._source.prefetch(shard)
        self._close_removed()

    def _close_removed(self) -> None:
        """Close idle shards whose file is gone: an open one would keep its place on the disk."""
        self._next_look = time.monotonic() + _FRESH_SECONDS
        with self._lock:
            opened = [(n, f.result()) for n, f in self._open.items() if f.done()]
            for number in [number for number, shard in opened if shard.is_left()]:
                del self._open[number]


class _Expected:
    """How many of the batches ahead read each shard; the source is told of every change."""

    def __init__(self, files: Sequence[ShardFile], source: ShardSource) -> None:
        self._files = files
        self._source = source
        self._counts: Counter[int] = Counter()
        self._num_bytes = 0

    def is_too_much(self) -> bool:
        """Say whether more shards are expected than the source brings near."""
        return self._num_bytes > self._source.ahead_bytes

    def add(self, shards: list[int]) -> list[ShardFile]:
        """Count a batch's shards; return those that no batch before it reads."""
        fresh = [self._files[number] for number in shards if number not in self._counts]
        self._counts.update(shards)
        self._tell(fresh, sign=1)
        return fresh

    def remove(self, shards: list[int]) -> None:
        """Take a batch's shards off the count."""
        self._counts.subtract(shards)
        gone = [number for number in shards if self._counts[number] == 0]
        for number in gone:
            del self._counts[number]
        self._tell([self._files[number] for number in gone], sign=-1)

    def _tell(self, changed: list[ShardFile], *, sign: int) -> None:
        if changed:
            self._num_bytes += sign * sum(shard.num_bytes for shard in changed)
            self._source.expect(self._files[number] for number in self._counts)


class _OpenShard:
    """A descriptor that is closed when the last one who reads from it has let go of it."""

    def __init__(self, descriptor: int, *, keep_fresh: bool) -> None:
        self._descriptor = descriptor
        self._last_read = time.monotonic()
        self._fresh_until = self._last_read + _FRESH_SECONDS if keep_fresh else math.inf

    def __del__(self) -> None:
        os.close(self._descriptor)

    def read(self, offset: int, size: int) -> bytes:
        """Return ``size`` bytes from ``offset``.

        Raises:
            EOFError: the shard is shorter.
            OSError: the storage fails.
        """
        if size == 0:
            return b""
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise EOFError("the shard is too short")
        self._last_read = time.monotonic()
        if self._last_read > self._fresh_until:
            self._fresh_until = self._last_read + _FRESH_SECONDS
            mark_used(self._descriptor)
        return content

    def is_left(self) -> bool:
        """Say whether the file has no name any more, and was not read lately."""
        idle = time.monotonic() - self._last_read > _IDLE_SECONDS
        return idle and os.fstat(self._descriptor).st_nlink == 0


def open_shards(
    dataset: Path, table: SampleTable, config: ShardsConfig, *, num_readers: int = 1
) -> ShardReader:
    """Return the reader of a dataset's samples.

    Args:
        dataset: its folder.
        table: its samples.
        config: where the shards are.
        num_readers: processes on this host that read different shards at the same time.

    Raises:
        UserError: the manifest lists what is no shard, or the place or the cache of far-away ones
            cannot be used.
    """
    files = shard_files(dataset, table.shard_names)
    verify = table.crc32 is None
    if config.root is None:
        return ShardReader(table, files, LocalShards(dataset, verify=verify))
    cache = ShardCache(config, files, verify=verify, num_readers=num_readers)
    return ShardReader(table, files, cache)


def _narrow(column: pa.ChunkedArray | pa.Array) -> Unsigned:
    """Return numbers that are not negative in the narrowest type that holds them."""
    numbers = column.to_numpy()
    result: Unsigned = numbers.astype(np.min_scalar_type(int(numbers.max(initial=0))))
    return result


def _max_open_shards() -> int:
    """Return how many shards may be open: at most half of the files that the process may have."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return (
        _MAX_OPEN_SHARDS if limit == resource.RLIM_INFINITY else min(_MAX_OPEN_SHARDS, limit // 2)
    )
