"""What the version before has of a chunk: its digest, its rows, its pictures (base -> shards).

Two tables of a dataset are for this alone, and are no part of its identity. ``chunks.parquet`` has
a row for each chunk with the digest of all that decided its shard; ``pictures.parquet`` a row for
each picture that was looked at: what became of it, and its source, the digest of the reference, of
the state there and of the rules, by which a later version knows that nothing changed.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

CHUNKS = pa.schema(
    [
        pa.field("chunk", pa.int64(), nullable=False),
        pa.field("digest", pa.string(), nullable=False),
        pa.field("first_item", pa.int64(), nullable=False),
        pa.field("num_items", pa.int64(), nullable=False),
        pa.field("num_samples", pa.int64(), nullable=False),
        pa.field("num_bad_images", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("tally", pa.string(), nullable=False),
    ]
)
PICTURES = pa.schema(
    [
        pa.field("item_index", pa.int64(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("kept", pa.bool_(), nullable=False),
        pa.field("animated", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)
# Raised whenever the same rows and pictures would become another shard or other rows of the tables.
_FORMAT_VERSION = 2  # 2: samples have checksums
_SOURCE_BYTES = 16
_CHUNKS_FILE = "chunks.parquet"


@dataclasses.dataclass(frozen=True)
class Chunk:
    """What is known of a finished chunk; a row of CHUNKS.

    Attributes:
        chunk: its number.
        digest: of its rows, its pictures' sources and the rules.
        first_item: its first item_index.
        num_items: items, removed ones included.
        num_samples: samples in its shard.
        num_bad_images: pictures that could not be used.
        shard: path in the artifact; empty without samples.
        bytes: size of the shard.
        sha256: of the shard.
        tally: its statistics, as JSON.
    """

    chunk: int
    digest: str
    first_item: int
    num_items: int
    num_samples: int
    num_bad_images: int
    shard: str
    bytes: int
    sha256: str
    tally: str

    def read_tally(self) -> dict[str, Any]:
        """Return the statistics."""
        content: dict[str, Any] = json.loads(self.tally)
        return content


class Base:
    """A finished version, read in ranges; one object a process is enough (see ``open_base``)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rows = pq.read_table(folder / _CHUNKS_FILE, schema=CHUNKS).to_pylist()
        self._chunks = {row["chunk"]: Chunk(**row) for row in rows}
        self._shards = {chunk.shard: chunk for chunk in self._chunks.values()}
        self._tables: dict[str, _RangedTable] = {}

    def chunk(self, number: int) -> Chunk | None:
        """Return what is known of a chunk."""
        return self._chunks.get(number)

    def chunk_of(self, shard: str) -> Chunk | None:
        """Return the chunk that a shard was made of."""
        return self._shards.get(shard)

    def rows(self, table: str, first: int, end: int) -> pa.Table:
        """Return the rows of items ``first`` to ``end`` (excluded) of items, samples, pictures."""
        if table not in self._tables:
            self._tables[table] = _RangedTable(self.folder / f"{table}.parquet")
        return self._tables[table].rows(first, end)


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A chunk as a run that was stopped made it: like a base, but of this chunk alone.

    Attributes:
        folder: the draft, which has the shard.
        made: the chunk.
        parts: name of a table -> its rows of the chunk.
    """

    folder: Path
    made: Chunk
    parts: Mapping[str, Path]

    def chunk_of(self, shard: str) -> Chunk | None:
        """Return the chunk if the shard is its."""
        return self.made if shard == self.made.shard else None

    def rows(self, table: str, first: int, end: int) -> pa.Table:
        """Return the rows of a table; items ``first`` to ``end`` are all of the chunk."""
        assert (first, end) == (self.made.first_item, self.made.first_item + self.made.num_items)
        return pq.read_table(self.parts[table])


def open_base(folder: Path) -> Base:
    """Return a version's tables; a process opens them once, however many chunks it makes."""
    status = (folder / _CHUNKS_FILE).stat()
    return _open_base(folder, status.st_ino, status.st_mtime_ns)


@functools.lru_cache(maxsize=2)
def _open_base(folder: Path, *state: int) -> Base:
    """Open a version; one that was made anew at the same place has another ``state``."""
    del state
    return Base(folder)


class _RangedTable:
    """A table sorted by item_index, of which only the row groups asked for are read."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        # (num_row_groups,) last item_index of each
        self._last = np.array(
            [
                metadata.row_group(group).column(0).statistics.max
                for group in range(metadata.num_row_groups)
            ],
            dtype=np.int64,
        )

    def rows(self, first: int, end: int) -> pa.Table:
        start, stop = np.searchsorted(self._last, [first, end - 1])
        groups = range(int(start), min(int(stop) + 1, len(self._last)))
        table = self._file.read_row_groups(list(groups), use_threads=False)
        index = table["item_index"].to_numpy()
        low, high = np.searchsorted(index, [first, end])
        return table.slice(int(low), int(high - low))


def source_digest(*parts: str) -> str:
    """Return the digest of what decides a picture: rules, revision, state and reference."""
    text = json.dumps(parts, ensure_ascii=True)
    return hashlib.blake2b(text.encode(), digest_size=_SOURCE_BYTES).hexdigest()


def state_of_bytes(data: bytes) -> str:
    """Return the state of a picture that lies in the item table itself."""
    return hashlib.blake2b(data, digest_size=_SOURCE_BYTES).hexdigest()


def chunk_digest(rows: pa.Table, sources: Iterable[str], rules: Sequence[Any]) -> str:
    """Return the digest of all that decides a chunk's shard and its rows of the tables.

    Args:
        rows: the chunk's rows; columns of whole numbers, truth values and strings.
        sources: of each row's picture; empty where it has none.
        rules: JSON values, the same for all chunks.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT_VERSION, len(rows), *rules]).encode())
    for name in rows.column_names:
        digest.update(name.encode() + b"\0")
        for part in _canonical(rows[name]):
            digest.update(np.ascontiguousarray(part).data)
    for source in sources:
        digest.update(source.encode() + b"\0")
    return digest.hexdigest()


def _canonical(column: pa.ChunkedArray) -> list[npt.NDArray[Any]]:
    """Return a column as buffers that depend on its values alone, not on how it was cut."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    if not pa.types.is_string(array.type):
        return [valid, array.to_numpy(zero_copy_only=False)]
    lengths = pc.fill_null(pc.binary_length(array), -1).to_numpy(zero_copy_only=False)
    return [valid, lengths, _text_bytes(array.drop_null())]


def _text_bytes(array: pa.Array) -> npt.NDArray[np.uint8]:
    """Return the bytes of strings without nulls, one after the other."""
    _, offsets, data = array.buffers()
    if not len(array) or data is None:
        return np.zeros(0, dtype=np.uint8)
    ends = np.frombuffer(offsets, dtype=np.int32)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, dtype=np.uint8)[ends[0] : ends[-1]]
