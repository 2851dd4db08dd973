"""Parquet files in, batches of columns of bounded size out (files -> tables).

A value that repeats lies in a parquet file once, whatever its size: 60,000 rows of a megabyte can
be a file of a megabyte. So such columns are read as numbers of their values, and what a batch takes
is known before it is spelled out. Where that cannot be done, few rows are read at a time.
"""

import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.errors import UserError
from data_prep.locations import Piece, RawFile
from data_prep.readers import Columns, MalformedRow, check_columns_present, numbered

MAX_PARQUET_ROW_BYTES = 256 << 20
_BATCH_ROWS = 65_536
_BATCH_BYTES = 64 << 20
_WORST_BATCH_BYTES = 512 << 20
_BUFFER_BYTES = 1 << 20
_VALUE_BYTES = 8
# Thrift's compact form of: type 2, a dictionary; then its size unpacked, 7 bits a byte, times two.
_PAGE_HEADER = re.compile(rb"\x15\x04\x15([\x80-\xff]{0,4}[\x00-\x7f])", re.DOTALL)
_CODABLE = ("STRING", "NONE", "JSON", "ENUM")
_OF_ANY_LENGTH = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
Ints = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """A column, or a field of a struct or list, in the row groups that are read.

    Attributes:
        name: dotted path.
        is_coded: it is read as numbers of its values.
        row_bytes: what a row takes on average, in the row group where that is most.
        worst_row_bytes: what one with the usual number of values takes at most; 0: no more.
    """

    name: str
    is_coded: bool
    row_bytes: float
    worst_row_bytes: float


def read_parquet(
    piece: Piece,
    columns: Columns,
    malformed: list[MalformedRow],  # noqa: ARG001 - one signature
) -> Iterator[pa.Table]:
    """Yield the rows of a parquet file, or of some of its row groups.

    Raises:
        UserError: a row above ``MAX_PARQUET_ROW_BYTES``.
    """
    file = piece.file
    with file.open() as stream:
        metadata = pq.read_metadata(stream)
        check_columns_present(file, columns, metadata.schema.to_arrow_schema().names)
        groups = list(piece.row_groups or range(metadata.num_row_groups))
        of_groups = [metadata.row_group(group) for group in groups]
        leaves = [
            _leaf(stream, metadata.schema.column(index), index, of_groups)
            for index in range(metadata.num_columns)
            if metadata.schema.column(index).path.partition(".")[0] in columns.names
        ]
        coded = [leaf.name for leaf in leaves if leaf.is_coded]
        table = pq.ParquetFile(
            stream, metadata=metadata, read_dictionary=coded, buffer_size=_BUFFER_BYTES
        )
        row = piece.first_row + 1
        for batch in table.iter_batches(
            batch_size=_batch_rows(leaves), row_groups=groups, columns=columns.names
        ):
            for part in _parts(file, batch.select(columns.names), row):
                yield numbered(_spelled_out(part), np.arange(row, row + len(part)))
                row += len(part)


def _leaf(
    stream: IO[bytes], column: pq.ColumnSchema, index: int, groups: list[pq.RowGroupMetaData]
) -> _Leaf:
    """Describe what lies in a column of some row groups."""
    chunks = [group.column(index) for group in groups]
    encodings = {name for chunk in chunks for name in chunk.encodings}
    is_text = column.physical_type == "BYTE_ARRAY" and column.logical_type.type in _CODABLE
    repeats = is_text and any("DICTIONARY" in e or e == "DELTA_BYTE_ARRAY" for e in encodings)
    # pyarrow can do it neither in structs and lists nor with these encodings, and it holds all the
    # values of a chunk then.
    is_coded = (
        repeats
        and "." not in column.path
        and not any("DELTA" in e for e in encodings)
        and all(chunk.total_uncompressed_size <= _BATCH_BYTES for chunk in chunks)
    )
    width = max(column.length, _VALUE_BYTES)
    row_bytes = worst = 0.0
    for group, chunk in zip(groups, chunks, strict=True):
        rows = max(group.num_rows, 1)
        size = max(chunk.total_uncompressed_size, chunk.num_values * width)
        row_bytes = max(row_bytes, size / rows)
        if repeats and not is_coded:
            worst = max(worst, _longest_value(stream, chunk) * max(chunk.num_values / rows, 1.0))
    return _Leaf(column.path, is_coded, row_bytes, worst)


def _longest_value(stream: IO[bytes], chunk: pq.ColumnChunkMetaData) -> int:
    """Return a size that no value of a chunk exceeds: that of its dictionary, or of all of it."""
    if "DELTA_BYTE_ARRAY" not in chunk.encodings:
        stream.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        found = _PAGE_HEADER.match(stream.read(16))
        if found:
            digits = (byte & 0x7F for byte in found[1])
            return sum(digit << 7 * place for place, digit in enumerate(digits)) >> 1
    return int(chunk.total_uncompressed_size)


def _batch_rows(leaves: list[_Leaf]) -> int:
    """Return how many rows fit into a batch of bounded size, as they are read."""
    average = sum(leaf.row_bytes for leaf in leaves)
    worst = sum(leaf.worst_row_bytes for leaf in leaves)
    rows = min(_BATCH_BYTES / max(average, 1.0), _WORST_BATCH_BYTES / max(worst, 1.0))
    return max(1, min(_BATCH_ROWS, int(rows)))


def _parts(file: RawFile, batch: pa.RecordBatch, first_row: int) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a batch, as many at a time as fit when their values are spelled out.

    Raises:
        UserError: one alone is too large.
    """
    sizes = functools.reduce(np.add, map(_row_sizes, batch.columns), np.zeros(len(batch), np.int64))
    too_large = np.flatnonzero(sizes > MAX_PARQUET_ROW_BYTES)
    if len(too_large):
        raise UserError(
            f"{file.url} row {first_row + too_large[0]} takes {sizes[too_large[0]]:,} bytes, more "
            f"than {MAX_PARQUET_ROW_BYTES:,}: it would fill the memory. Correct that row."
        )
    ends = np.cumsum(sizes)
    start = 0
    while start < len(batch):
        limit = _BATCH_BYTES + (ends[start - 1] if start else 0)
        end = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield batch.slice(start, end - start)
        start = end


def _row_sizes(array: pa.Array) -> Ints:
    """Return the bytes that each value takes when it is spelled out."""
    kind = array.type
    if pa.types.is_dictionary(kind):
        sizes = np.append(_row_sizes(array.dictionary), 0)  # the last one for nulls
        codes = pc.fill_null(array.indices, len(sizes) - 1).to_numpy()
        return np.asarray(sizes[codes], np.int64)
    if pa.types.is_struct(kind):
        nothing = np.zeros(len(array), np.int64)
        return functools.reduce(np.add, map(_row_sizes, array.flatten()), nothing)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_map(kind):
        ends = np.concatenate([[0], np.cumsum(_row_sizes(array.values))])
        offsets = array.offsets.to_numpy()
        return np.asarray(ends[offsets[1:]] - ends[offsets[:-1]], np.int64)
    if any(test(kind) for test in _OF_ANY_LENGTH):
        return np.asarray(pc.fill_null(pc.binary_length(array), 0).to_numpy(), np.int64)
    return np.full(len(array), array.nbytes // max(len(array), 1), np.int64)


def _spelled_out(batch: pa.RecordBatch) -> pa.Table:
    """Return a batch with the values themselves."""
    kinds = [f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in batch.schema]
    fields = [field.with_type(kind) for field, kind in zip(batch.schema, kinds, strict=True)]
    return pa.Table.from_batches([batch]).cast(pa.schema(fields))
