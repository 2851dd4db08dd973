"""Item table in, item_index and chunks of rows out (sources -> shards).

Two passes over the table: the first reads the keys alone, the second copies the rows that stay into
chunks of ``shards.max_samples`` rows, so that no process ever holds the whole catalogue. Rows that
do not come in the order of item_index, because the version before numbered them, go over the disk.
"""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.artifacts import write_json
from alignrec.errors import StageFailure, UserError
from data_prep import sorting, units
from data_prep.config import ItemColumns
from data_prep.locations import RawFile
from data_prep.pictures import IMAGE, IMAGE_BYTES
from data_prep.quarantine import Quarantine, Reason
from data_prep.shards import REMOVED, TEXT_PREFIX, TITLE
from data_prep.tables import (
    Columns,
    MalformedRow,
    MalformedRows,
    bytes_column,
    check_columns,
    read_batches,
)

SETTING = "data_prep.items.columns"
MAX_KEY_BYTES = 256
_REMOVED_ROWS = 65_536
_LISTED_ROWS = 1 << 20
Ints = npt.NDArray[np.int64]
_CONTROL = r"[\x00-\x1f\x7f]"


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the item table.

    Attributes:
        good: the key of every item, in the order of their first rows, as large strings: all keys
            together may have more than 2 GiB.
        is_good: (num_rows,) rows that are items: with a valid key, seen for the first time.
        num_rows: rows of the table that could be parsed.
        num_malformed: rows that could not.
    """

    good: pa.Array
    is_good: npt.NDArray[np.bool_]
    num_rows: int
    num_malformed: int


def read_keys(files: Sequence[RawFile], columns: ItemColumns, quarantine: Quarantine) -> Keys:
    """Read the key column; rows without a usable key go to quarantine.

    Raises:
        UserError: the table has no item at all.
    """
    check_columns(files, _all_columns(columns))

    def list_malformed(rows: Sequence[MalformedRow]) -> None:
        quarantine.add("items", ((row.where, Reason.MALFORMED_ROW, row.detail) for row in rows))

    malformed = MalformedRows(list_malformed)
    wanted = Columns(SETTING, text=(columns.key,))
    batches = [
        batch[columns.key].cast(pa.large_string())
        for batch in read_batches(files, wanted, malformed)
    ]
    malformed.flush()
    parts = [chunk for batch in batches for chunk in batch.chunks]
    keys = pa.chunked_array(parts, pa.large_string()).combine_chunks()
    is_good = _judge(keys, quarantine)
    good = keys.filter(pa.array(is_good))
    if not len(good):
        raise UserError(
            f"{files[0].url}{f' and {len(files) - 1} more files' if files[1:] else ''}: the item "
            f"table has no item with a key ({len(keys):,} rows read), so there is nothing to "
            f"prepare. Check data_prep.items.path and {SETTING}.key."
        )
    return Keys(good, is_good, len(keys), malformed.total)


def invalid_keys(keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which keys cannot be used: too long, or with control characters."""
    too_long = pc.greater(pc.binary_length(keys), MAX_KEY_BYTES)
    control = pc.match_substring_regex(keys, _CONTROL)
    result: npt.NDArray[np.bool_] = pc.fill_null(pc.or_(too_long, control), False).to_numpy(
        zero_copy_only=False
    )
    return result


def missing_keys(keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which keys are null, empty or blank."""
    blank = pc.equal(pc.binary_length(pc.utf8_trim_whitespace(keys)), 0)
    result: npt.NDArray[np.bool_] = pc.fill_null(blank, True).to_numpy(zero_copy_only=False)
    return result


def first_occurrences(keys: pa.Array) -> npt.NDArray[np.bool_]:
    """Return which rows hold their key for the first time; nulls never do."""
    codes = keys.dictionary_encode().indices.fill_null(-1).to_numpy(zero_copy_only=False)
    values, first = np.unique(codes, return_index=True)
    result = np.zeros(len(codes), dtype=bool)
    result[first[values >= 0]] = True
    return result


@dataclasses.dataclass(frozen=True)
class Numbering:
    """Which item_index the keys of the item table get.

    Attributes:
        earlier: keys of the version before in item_index order; they keep their numbers.
        known: (num_keys,) item_index of each present key in the version before, -1 for new ones.
    """

    earlier: pa.Array
    known: Ints

    @classmethod
    def of(cls, keys: pa.Array, earlier: pa.Array | None = None) -> Self:
        """Compare the keys of the item table with those of the version before."""
        earlier = pa.array([], keys.type) if earlier is None else earlier.cast(keys.type)
        known = pc.fill_null(pc.index_in(keys, value_set=earlier), -1)
        return cls(earlier, known.to_numpy().astype(np.int64))

    def assign(self, kept: npt.NDArray[np.bool_]) -> Ints:
        """Return the item_index of each key, -1 where it is not kept.

        Keys of the version before have their old numbers, kept or not; new ones follow in the
        order of the item table.
        """
        is_new = kept & (self.known < 0)
        numbers = np.where(kept, self.known, -1)
        numbers[is_new] = len(self.earlier) + np.arange(int(is_new.sum()))
        return numbers

    def removed(self, numbers: Ints) -> pa.Table:
        """Return (item_index, item_key) of what the version before had and ``numbers`` has not."""
        is_there = np.zeros(len(self.earlier), dtype=bool)
        is_there[numbers[(numbers >= 0) & (numbers < len(self.earlier))]] = True
        gone = np.flatnonzero(~is_there)
        return pa.table({"item_index": gone, "item_key": self.earlier.take(pa.array(gone))})


def write_chunks(
    files: Sequence[RawFile],
    columns: ItemColumns,
    *,
    keys: Keys,
    numbers: Ints,
    removed: pa.Table,
    folder: Path,
    max_rows: int,
) -> int:
    """Copy the rows that are items into ``<folder>/<chunk>.parquet`` and return how many chunks.

    Chunk c holds item_index ``c * max_rows`` up to below ``(c + 1) * max_rows``, in this order.

    Args:
        files: the item table.
        columns: column mapping.
        keys: what the first pass read.
        numbers: (num_rows,) item_index of each row of the table, -1 for rows that do not stay.
        removed: item_index and item_key of removed items, which get a row without content.
        folder: receives the chunks; a finished copy is not made again.
        max_rows: item_index in every chunk but the last.

    Raises:
        StageFailure: the table is not what the first pass read.
    """
    mark = folder / "done.json"
    if mark.exists():
        return int(json.loads(mark.read_text())["num_chunks"])
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    rows = _rows(files, columns, keys, numbers)
    present = numbers[numbers >= 0]
    if not len(removed) and bool(np.all(np.diff(present) > 0)):
        chunks = _rechunk(rows, max_rows)
    else:
        gone = (_row_of_removed(part, columns) for part in removed.to_batches(_REMOVED_ROWS))
        chunks = sorting.sorted_chunks(
            itertools.chain(rows, gone),
            num_rows=len(present) + len(removed),
            max_rows=max_rows,
            folder=folder / "sorting",
        )
    num_chunks = 0
    for num_chunks, chunk in enumerate(chunks, start=1):
        pq.write_table(chunk, folder / f"{num_chunks - 1:06d}.parquet")
    write_json(mark, {"num_chunks": num_chunks})
    return num_chunks


def _judge(keys: pa.Array, quarantine: Quarantine) -> npt.NDArray[np.bool_]:
    missing = missing_keys(keys)
    invalid = invalid_keys(keys) & ~missing
    usable = ~missing & ~invalid
    first = first_occurrences(pc.if_else(pa.array(usable), keys, None))
    verdicts = (
        (missing, Reason.MISSING_KEY),
        (invalid, Reason.INVALID_KEY),
        (usable & ~first, Reason.DUPLICATE_KEY),
    )
    for mask, reason in verdicts:
        bad = np.flatnonzero(mask)
        for rows in np.split(bad, range(_LISTED_ROWS, len(bad), _LISTED_ROWS)):
            short = pc.utf8_slice_codeunits(keys.take(pa.array(rows)), 0, MAX_KEY_BYTES)
            quarantine.add_columns("items", short.cast(pa.string()), reason, row_details(rows))
    return usable & first


def row_details(rows: npt.NDArray[np.int64]) -> pa.Array:
    """Return "row 1" for the first row, and so on."""
    return pc.binary_join_element_wise("row", pa.array(rows + 1).cast(pa.string()), " ")


def _as_before(
    batches: Iterator[pa.Table], column: str, keys: Keys, files: Sequence[RawFile]
) -> Iterator[pa.Table]:
    """Yield the batches of the second pass, row for row what the first one read.

    Raises:
        StageFailure: a file was replaced in between.
    """
    num_rows = num_good = 0
    is_same = True
    for batch in batches:
        is_good = keys.is_good[num_rows : num_rows + len(batch)]
        expected = keys.good.slice(num_good, int(is_good.sum()))
        num_rows += len(batch)
        num_good += len(expected)
        is_same = len(is_good) == len(batch)
        if is_same:
            found = batch[column].filter(pa.array(is_good)).cast(keys.good.type)
            is_same = found.equals(pa.chunked_array([expected]))
        if not is_same:
            break
        yield batch
    if not is_same or num_rows != len(keys.is_good):
        raise changed(f"{files[0].url}: the item table")


def changed(what: str) -> StageFailure:
    """Return the failure of a run whose raw data did not stay what it was."""
    return StageFailure(
        f"{what} changed while it was read, so items, numbers and interactions would not belong "
        f"together. Nothing was published: run the same command again when it is complete, and "
        f"have it replaced by rename."
    )


def _rows(
    files: Sequence[RawFile], columns: ItemColumns, keys: Keys, numbers: Ints
) -> Iterator[pa.Table]:
    """Yield the items' rows with the columns that a shard task expects."""
    start = 0
    batches = read_batches(files, _all_columns(columns), MalformedRows())
    for batch in _as_before(batches, columns.key, keys, files):
        index = numbers[start : start + len(batch)]
        start += len(batch)
        kept = batch.filter(pa.array(index >= 0))
        nothing = pa.nulls(len(kept), pa.string())
        image = kept[columns.image] if columns.image else nothing
        content = kept[bytes_column(columns.image)] if columns.image else None
        yield pa.table(
            {
                "item_index": index[index >= 0],
                "item_key": kept[columns.key],
                TITLE: kept[columns.title] if columns.title else nothing,
                IMAGE: pc.if_else(pc.equal(image, ""), None, image),
                IMAGE_BYTES: pa.nulls(len(kept), pa.large_binary()) if content is None else content,
                REMOVED: np.zeros(len(kept), dtype=bool),
                **{TEXT_PREFIX + name: kept[name] for name in columns.text},
            }
        )


def _row_of_removed(items: pa.RecordBatch, columns: ItemColumns) -> pa.Table:
    """Return rows without content, with the columns of ``_rows``."""
    nothing = pa.nulls(len(items), pa.string())
    return pa.table(
        {
            "item_index": items["item_index"],
            "item_key": units.as_strings(items["item_key"]),
            TITLE: nothing,
            IMAGE: nothing,
            IMAGE_BYTES: pa.nulls(len(items), pa.large_binary()),
            REMOVED: np.ones(len(items), dtype=bool),
            **{TEXT_PREFIX + name: nothing for name in columns.text},
        }
    )


def _all_columns(columns: ItemColumns) -> Columns:
    titles = () if columns.title is None else (columns.title,)
    pictures = () if columns.image is None else (columns.image,)
    return Columns(SETTING, text=(columns.key, *columns.text, *titles), binary=pictures)


def _rechunk(tables: Iterator[pa.Table], max_rows: int) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while sum(map(len, waiting)) >= max_rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, max_rows)
            waiting = [joined.slice(max_rows)]
    if sum(map(len, waiting)):
        yield pa.concat_tables(waiting)
