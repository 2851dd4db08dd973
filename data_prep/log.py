"""Raw log in, coded rows in buckets of users out (sources -> buckets).

The log is read once, piece by piece. A piece is read in runs of bounded size; a run leaves two
files, in each of which the n-th record batch belongs to bucket n: the run's users, and its rows.
"""

import dataclasses
import json
import posixpath
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.artifacts import write_json
from alignrec.data import schema
from data_prep import units
from data_prep.catalogue import MAX_KEY_BYTES, invalid_keys, missing_keys
from data_prep.config import InteractionColumns
from data_prep.hashing import Hashes, bucket_of, hash_keys
from data_prep.locations import Piece, RawFile
from data_prep.quarantine import Reason, column_table, count_reasons, make_table
from data_prep.readers import MalformedRows, damage_named
from data_prep.tables import ROW, Columns, MalformedRow, read_batches
from data_prep.values import Bools, Ints, to_ratings, to_timestamps

SETTING = "data_prep.interactions.columns"
SOURCE = "interactions"
UNKNOWN_TIME = np.iinfo(np.int64).min
_PIECE_BITS = 40  # a row's number in its file has fewer bits
RUN_ROWS = 1 << 20
_RUN_BYTES = 256 << 20
_TEXT_BYTES_PER_ROW = 30.0
_PACKING = 4.0  # how much smaller a packed log is
_GOOD = 0
_VERDICTS = (
    Reason.MISSING_USER,
    Reason.INVALID_KEY,
    Reason.MISSING_ITEM,
    Reason.UNKNOWN_ITEM,
    Reason.BAD_RATING,
    Reason.BAD_TIMESTAMP,
)
_UNKNOWN_ITEM = 1 + _VERDICTS.index(Reason.UNKNOWN_ITEM)
_REASON_NAMES = pa.array([reason.value for reason in _VERDICTS])


@dataclasses.dataclass(frozen=True)
class LogPlan:
    """What the tasks that read the log share.

    Attributes:
        columns: column mapping.
        item_keys: file of the key of every item.
        num_buckets: parts that users are divided into.
        need_timestamps: a row without a time is unusable.
        drop_unknown_items: rows of unknown items are left out without being listed.
        name_files: the log has several files.
        folder: receives a unit for each piece.
    """

    columns: InteractionColumns
    item_keys: Path
    num_buckets: int
    need_timestamps: bool
    drop_unknown_items: bool
    name_files: bool
    folder: Path

    def unit(self, number: int) -> Path:
        """Return the folder of a piece's rows."""
        return self.folder / f"{number:06d}"


@dataclasses.dataclass(frozen=True)
class _Run:
    """Rows of a piece, one after the other.

    Attributes:
        user: (n,) keys.
        item: (n,) keys.
        rating: (n,) NaN where unknown.
        time: (n,) ``UNKNOWN_TIME`` where unknown.
        row: (n,) number in the file, from 1.
        bad_rating: (n,) no usable number.
        bad_time: (n,) no usable time.
    """

    user: pa.Array
    item: pa.Array
    rating: npt.NDArray[np.float32]
    time: Ints
    row: Ints
    bad_rating: Bools
    bad_time: Bools


def estimate_rows(files: Sequence[RawFile]) -> int:
    """Guess the number of rows of a log from the sizes of its files and its first file.

    Raises:
        UserError: that file is damaged.
    """
    first = files[0]
    rows_per_byte = 1 / _TEXT_BYTES_PER_ROW
    if first.suffix in (".parquet", ".pq") and first.size > 0:
        with damage_named(first), first.open() as stream:
            rows_per_byte = pq.read_metadata(stream).num_rows / first.size
    elif first.compression is not None:
        rows_per_byte *= _PACKING
    return int(sum(max(file.size, 0) for file in files) * rows_per_byte)


def scatter(
    numbered_piece: tuple[int, Piece],
    plan: LogPlan,
    report: Callable[[int], None] = lambda _: None,
) -> int:
    """Write the usable rows of a piece into its unit, by bucket, and the others beside them.

    Args:
        numbered_piece: number and piece of the log.
        plan: what the tasks share.
        report: called with the number of rows that were done since its last call.

    Returns:
        Rows of the piece, good and bad.
    """
    number, piece = numbered_piece
    facts: dict[str, Any] = {"rows": 0, "usable": 0, "unknown_items_dropped": 0, "runs": 0}
    item_keys = units.load_strings(plan.item_keys)
    with units.writing(plan.unit(number)) as folder:
        listed = _Listed(folder / "quarantine.parquet")
        malformed = MalformedRows(listed.add_malformed)
        for run in _runs(piece, plan, malformed):
            malformed.flush()
            position, verdict, users = _judge(run, item_keys, plan)
            if plan.drop_unknown_items:
                facts["unknown_items_dropped"] += int(np.sum(verdict == _UNKNOWN_ITEM))
            listed.add_rows(run, verdict, piece, plan)
            rows = np.flatnonzero(verdict == _GOOD)
            if len(rows):
                stem = folder / f"{facts['runs']:06d}"
                _write_run(stem, run, rows, position, users, plan, number << _PIECE_BITS)
                facts["runs"] += 1
            facts["rows"] += len(run.row)
            facts["usable"] += len(rows)
            report(len(run.row))
        malformed.flush()
        facts["quarantined"] = listed.close()
        facts["rows"] += facts["quarantined"].get(Reason.MALFORMED_ROW, 0)
        write_json(folder / "facts.json", facts)
    return int(facts["rows"])


def read_facts(unit: Path) -> dict[str, Any]:
    """Return what a task wrote about its unit."""
    facts: dict[str, Any] = json.loads((unit / "facts.json").read_text())
    return facts


def read_bucket(unit: Path, bucket: int) -> Iterator[tuple[pa.RecordBatch, pa.RecordBatch]]:
    """Yield users and rows of one bucket, run by run of a piece."""
    for run in range(read_facts(unit)["runs"]):
        parts = []
        for name in ("users", "rows"):
            with pa.memory_map(str(unit / f"{run:06d}.{name}.arrow")) as file:
                parts.append(pa.ipc.open_file(file).get_batch(bucket))
        yield parts[0], parts[1]


class _Listed:
    """The quarantine of one piece, written as it is found."""

    def __init__(self, path: Path) -> None:
        self._writer = pq.ParquetWriter(path, schema.QUARANTINE)
        self._counts: dict[str, int] = {}

    def add_malformed(self, malformed: Sequence[MalformedRow]) -> None:
        """List rows that could not be parsed."""
        keys, details = zip(*((row.where, row.detail) for row in malformed), strict=True)
        self._add(make_table(SOURCE, keys, [Reason.MALFORMED_ROW] * len(malformed), details))

    def add_rows(
        self, run: _Run, verdict: npt.NDArray[np.int8], piece: Piece, plan: LogPlan
    ) -> None:
        """List the rows of a run that have another verdict than good."""
        bad = verdict != _GOOD
        if plan.drop_unknown_items:
            bad &= verdict != _UNKNOWN_ITEM
        rows = np.flatnonzero(bad)
        if not len(rows):
            return
        user, item = (
            pc.utf8_slice_codeunits(pc.fill_null(keys.take(pa.array(rows)), ""), 0, MAX_KEY_BYTES)
            for keys in (run.user, run.item)
        )
        where = ["row", pa.array(run.row[rows]).cast(pa.string())]
        if plan.name_files:
            where += ["of", posixpath.basename(piece.file.url)]
        reasons = _REASON_NAMES.take(pa.array(verdict[rows] - 1))
        keys = pc.binary_join_element_wise(user, item, " -> ")
        details = pc.binary_join_element_wise(*where, " ")
        self._add(column_table(SOURCE, keys, reasons, details))

    def close(self) -> dict[str, int]:
        """Finish the file; return the number of rows by reason."""
        self._writer.close()
        return self._counts

    def _add(self, table: pa.Table) -> None:
        self._writer.write_table(table)
        for reason, count in count_reasons(table)[SOURCE].items():
            self._counts[reason] = self._counts.get(reason, 0) + count


def _runs(piece: Piece, plan: LogPlan, malformed: list[MalformedRow]) -> Iterator[_Run]:
    """Read a piece in runs of bounded size."""
    numbers = (plan.columns.rating, plan.columns.timestamp)
    wanted = Columns(
        SETTING,
        text=(plan.columns.user, plan.columns.item),
        other=tuple(name for name in numbers if name is not None),
    )
    waiting: list[_Run] = []
    num_rows = num_bytes = 0
    for batch in read_batches([piece], wanted, malformed):
        if not len(batch):
            continue
        waiting.append(_as_run(batch, plan))
        num_rows += len(batch)
        num_bytes += batch.nbytes
        if num_rows >= RUN_ROWS or num_bytes >= _RUN_BYTES:
            yield _joined(waiting)
            waiting = []
            num_rows = num_bytes = 0
    if waiting:
        yield _joined(waiting)


def _as_run(batch: pa.Table, plan: LogPlan) -> _Run:
    columns = plan.columns
    rating, bad_rating = to_ratings(batch[columns.rating] if columns.rating else None, len(batch))
    time, has_time, bad_time = to_timestamps(
        batch[columns.timestamp] if columns.timestamp else None, len(batch)
    )
    return _Run(
        user=batch[columns.user].combine_chunks(),
        item=batch[columns.item].combine_chunks(),
        rating=rating,
        time=np.where(has_time, time, UNKNOWN_TIME),
        row=batch[ROW].to_numpy(),
        bad_rating=bad_rating,
        bad_time=bad_time | ~has_time if plan.need_timestamps else bad_time,
    )


def _joined(runs: Sequence[_Run]) -> _Run:
    columns = {
        field.name: [getattr(run, field.name) for run in runs] for field in dataclasses.fields(_Run)
    }
    return _Run(
        **{
            name: (pa.concat_arrays if name in ("user", "item") else np.concatenate)(parts)
            for name, parts in columns.items()
        }
    )


def _judge(
    run: _Run, item_keys: pa.Array, plan: LogPlan
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int8], "_Users"]:
    """Find the item of every row, and what is wrong with the row: the first verdict counts.

    Returns:
        (n,) position in ``item_keys``, (n,) 0 or a verdict's number from 1, and the users.
    """
    users = _Users.of(run.user, plan.num_buckets)
    found = pc.index_in(run.item.cast(item_keys.type), value_set=item_keys)
    unknown = np.asarray(found.is_null().to_numpy(zero_copy_only=False))
    missing_item = np.zeros(len(unknown), dtype=bool)
    rows = np.flatnonzero(unknown)  # an item that is known has a good key
    missing_item[rows] = missing_keys(run.item.take(pa.array(rows)))
    verdict = np.full(len(unknown), _GOOD, dtype=np.int8)
    masks = (users.missing, users.invalid, missing_item, unknown, run.bad_rating, run.bad_time)
    for number, mask in reversed(list(enumerate(masks, start=1))):
        verdict[mask] = number
    return pc.fill_null(found, -1).to_numpy().astype(np.int32), verdict, users


@dataclasses.dataclass(frozen=True)
class _Users:
    """The users of a run.

    Attributes:
        code: (n,) number of each row's user among the run's; 0 where there is none.
        keys: key by number.
        hashes: hash by number.
        bucket: bucket by number.
        missing: (n,) rows without a user.
        invalid: (n,) rows whose user's key cannot be used.
    """

    code: npt.NDArray[np.int32]
    keys: pa.Array
    hashes: Hashes
    bucket: Ints
    missing: Bools
    invalid: Bools

    @classmethod
    def of(cls, column: pa.Array, num_buckets: int) -> "_Users":
        """Number the users; keys are judged and hashed once each."""
        encoded = column.dictionary_encode()
        keys = encoded.dictionary
        absent = np.asarray(encoded.indices.is_null().to_numpy(zero_copy_only=False))
        code = pc.fill_null(encoded.indices, 0).to_numpy()
        if not len(keys):
            keys = pa.array([""])  # every row lacks its user
        missing, invalid = missing_keys(keys), invalid_keys(keys)
        # Bad keys are of any length; the others are short.
        hashes = hash_keys(pc.if_else(pa.array(missing | invalid), "", keys))
        return cls(
            code=code,
            keys=keys,
            hashes=hashes,
            bucket=bucket_of(hashes, num_buckets),
            missing=absent | missing[code],
            invalid=invalid[code],
        )


def _write_run(
    stem: Path,
    run: _Run,
    rows: Ints,
    position: npt.NDArray[np.int32],
    users: _Users,
    plan: LogPlan,
    first_row: int,
) -> None:
    """Write the good rows of a run and their users, a record batch for each bucket."""
    code = users.code[rows]
    first = np.full(len(users.keys), -1, dtype=np.int64)
    first[code[::-1]] = rows[::-1]  # the last assignment is that of the first row
    present = np.flatnonzero(first >= 0)
    chosen, user_bounds = _by_bucket(users.bucket[present], plan.num_buckets)
    chosen = present[chosen]
    number = np.zeros(len(users.keys), dtype=np.int32)
    starts = np.repeat(user_bounds[:-1], np.diff(user_bounds))
    number[chosen] = np.arange(len(chosen)) - starts
    order, row_bounds = _by_bucket(users.bucket[code], plan.num_buckets)
    rows, code = rows[order], code[order]
    user_table = {
        "key": users.keys.take(pa.array(chosen)),
        "hash": users.hashes[chosen],
        "first_row": first_row + run.row[first[chosen]],
    }
    row_table = {"user": number[code], "item": position[rows], "row": first_row + run.row[rows]}
    if plan.columns.rating is not None:
        row_table["rating"] = run.rating[rows]
    if plan.columns.timestamp is not None:
        row_table["time"] = run.time[rows]
    _write_batches(stem.with_suffix(".users.arrow"), user_table, user_bounds)
    _write_batches(stem.with_suffix(".rows.arrow"), row_table, row_bounds)


def _by_bucket(buckets: Ints, num_buckets: int) -> tuple[Ints, Ints]:
    """Return the order that sorts by bucket, and where each bucket begins in it."""
    small = buckets.astype(np.uint16) if num_buckets <= 1 << 16 else buckets  # radix sort
    counts = np.bincount(buckets, minlength=num_buckets)
    return np.argsort(small, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


def _write_batches(path: Path, columns: dict[str, Any], bounds: Ints) -> None:
    batch = pa.RecordBatch.from_pydict(columns)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        for start, stop in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
            writer.write_batch(batch.slice(start, stop - start))
