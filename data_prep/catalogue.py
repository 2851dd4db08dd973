"""Item table in, item_index and chunks of rows out (sources -> shards).

Two passes over the table: the first reads the keys alone, the second copies the rows that stay into
chunks of ``shards.max_samples`` rows, so that no process ever holds the whole catalogue.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.artifacts import write_json
from alignrec.errors import UserError
from data_prep.config import ItemColumns
from data_prep.locations import RawFile
from data_prep.quarantine import Quarantine, Reason
from data_prep.shards import TEXT_PREFIX, TITLE
from data_prep.tables import Columns, MalformedRow, check_columns, read_batches

SETTING = "data_prep.items.columns"
MAX_KEY_BYTES = 256
_CONTROL = r"[\x00-\x1f\x7f]"


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of the item table.

    Attributes:
        good: the key of every item, in the order of their first rows.
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
    malformed: list[MalformedRow] = []
    wanted = Columns(SETTING, text=(columns.key,))
    batches = [batch[columns.key] for batch in read_batches(files, wanted, malformed)]
    keys = pa.chunked_array([c for b in batches for c in b.chunks], pa.string()).combine_chunks()
    is_good = _judge(keys, quarantine)
    quarantine.add("items", ((row.where, Reason.MALFORMED_ROW, row.detail) for row in malformed))
    good = keys.filter(pa.array(is_good))
    if not len(good):
        raise UserError(
            f"the item table has no item with a key ({len(keys):,} rows read), so there is nothing "
            f"to prepare. Check data_prep.items.path and {SETTING}.key."
        )
    return Keys(good, is_good, len(keys), len(malformed))


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


def write_chunks(
    files: Sequence[RawFile],
    columns: ItemColumns,
    *,
    is_item: npt.NDArray[np.bool_],
    folder: Path,
    max_rows: int,
) -> int:
    """Copy the rows that are items into ``<folder>/<chunk>.parquet`` and return how many chunks.

    Args:
        files: the item table.
        columns: column mapping.
        is_item: (num_rows,) rows that stay, in the order of the table.
        folder: receives the chunks; a finished copy is not made again.
        max_rows: rows in every chunk but the last.
    """
    mark = folder / "done.json"
    if mark.exists():
        return int(json.loads(mark.read_text())["num_chunks"])
    folder.mkdir(parents=True, exist_ok=True)
    num_chunks = 0
    rows = _rows(files, columns, is_item)
    for num_chunks, chunk in enumerate(_rechunk(rows, max_rows), start=1):
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
        rows = np.flatnonzero(mask)
        short = pc.utf8_slice_codeunits(keys.take(pa.array(rows)), 0, MAX_KEY_BYTES)
        quarantine.add_columns("items", short, reason, row_details(rows))
    return usable & first


def row_details(rows: npt.NDArray[np.int64]) -> pa.Array:
    """Return "row 1" for the first row, and so on."""
    return pc.binary_join_element_wise("row", pa.array(rows + 1).cast(pa.string()), " ")


def _rows(
    files: Sequence[RawFile], columns: ItemColumns, is_item: npt.NDArray[np.bool_]
) -> Iterator[pa.Table]:
    """Yield the items' rows with the columns that a shard task expects."""
    start = index = 0
    for batch in read_batches(files, _all_columns(columns), []):
        kept = batch.filter(pa.array(is_item[start : start + len(batch)]))
        start += len(batch)
        nothing = pa.nulls(len(kept), pa.string())
        image = kept[columns.image] if columns.image else nothing
        yield pa.table(
            {
                "item_index": np.arange(index, index + len(kept)),
                "item_key": kept[columns.key],
                TITLE: kept[columns.title] if columns.title else nothing,
                "image": pc.if_else(pc.equal(image, ""), None, image),
                **{TEXT_PREFIX + name: kept[name] for name in columns.text},
            }
        )
        index += len(kept)


def _all_columns(columns: ItemColumns) -> Columns:
    optional = [name for name in (columns.title, columns.image) if name is not None]
    return Columns(SETTING, text=(columns.key, *columns.text, *optional))


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
