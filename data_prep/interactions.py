"""Interaction log in, cleaned columns of numbers out (sources -> splits).

Everything is array arithmetic over columns: no Python per interaction.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from alignrec.errors import UserError
from data_prep.catalogue import MAX_KEY_BYTES, invalid_keys, missing_keys, row_details
from data_prep.config import InteractionColumns, InteractionsConfig
from data_prep.locations import RawFile
from data_prep.quarantine import Quarantine, Reason
from data_prep.tables import Columns, MalformedRow, read_batches

SETTING = "data_prep.interactions.columns"
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^\s*(?P<whole>-?[0-8]?\d{1,18})(?:\.0*)?\s*$"  # what int64 surely holds
_DATE = (
    r"^\s*(?P<day>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<time>\d{2}:\d{2}:\d{2})(?:\.\d+)?(?P<zone>Z|[+-]\d{2}:?\d{2})?)?\s*$"
)
_MAX_RATING = 1e9
_MAX_TIME = 2.0**62
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Log:
    """Interactions as numbers, in the order of the log.

    Attributes:
        user: (n,) number of the user, in the order of users' first rows.
        item: (n,) number of the item in the catalogue.
        rating: (n,) NaN where unknown.
        timestamp: (n,) seconds, or the log's own numbers; meaningless where ``has_timestamp`` is
            False.
        has_timestamp: (n,)
    """

    user: Ints
    item: Ints
    rating: npt.NDArray[np.float32]
    timestamp: Ints
    has_timestamp: Bools

    def __len__(self) -> int:
        return len(self.user)

    def select(self, rows: Ints | Bools) -> "Log":
        """Return the given rows."""
        fields = dataclasses.fields(self)
        return Log(**{field.name: getattr(self, field.name)[rows] for field in fields})


@dataclasses.dataclass(frozen=True)
class RawLog:
    """The columns of the log as they were read.

    Attributes:
        rating: null when the log has no ratings.
        timestamp: null when the log has no times.
        num_malformed: rows that could not be parsed.
    """

    user: pa.Array
    item: pa.Array
    rating: pa.ChunkedArray | None
    timestamp: pa.ChunkedArray | None
    num_malformed: int

    def __len__(self) -> int:
        return len(self.user)


def read_log(
    files: Sequence[RawFile], columns: InteractionColumns, quarantine: Quarantine
) -> RawLog:
    """Read the mapped columns of the log.

    Raises:
        UserError: the log is empty, unreadable or lacks a column.
    """
    numbers = tuple(name for name in (columns.rating, columns.timestamp) if name is not None)
    wanted = Columns(SETTING, text=(columns.user, columns.item), other=numbers)
    malformed: list[MalformedRow] = []
    batches = list(read_batches(files, wanted, malformed))
    quarantine.add(
        "interactions", ((row.where, Reason.MALFORMED_ROW, row.detail) for row in malformed)
    )
    if not sum(map(len, batches)):
        raise UserError(
            f"the interaction log {', '.join(file.url for file in files)} is empty: there is "
            f"nothing to learn from. Check data_prep.interactions.path."
        )
    return RawLog(
        user=_joined(batches, columns.user).cast(pa.string()).combine_chunks(),
        item=_joined(batches, columns.item).cast(pa.string()).combine_chunks(),
        rating=_joined(batches, columns.rating) if columns.rating else None,
        timestamp=_joined(batches, columns.timestamp) if columns.timestamp else None,
        num_malformed=len(malformed),
    )


def encode(
    raw: RawLog, item_keys: pa.Array, quarantine: Quarantine, *, need_timestamps: bool
) -> tuple[Log, pa.Array]:
    """Turn keys into numbers; rows that cannot be used go to quarantine.

    Args:
        raw: the log.
        item_keys: key of every item, by its number in the catalogue.
        quarantine: receives the unusable rows.
        need_timestamps: a row without a time is unusable.

    Returns:
        The usable rows, and the key of every user by number.
    """
    rating, bad_rating = to_ratings(raw.rating, len(raw))
    timestamp, has_timestamp, bad_timestamp = to_timestamps(raw.timestamp, len(raw))
    if need_timestamps:
        bad_timestamp = bad_timestamp | ~has_timestamp
    item = pc.index_in(raw.item, value_set=item_keys)
    known = item.is_valid().to_numpy(zero_copy_only=False)
    missing_user = missing_keys(raw.user)
    missing_item = missing_keys(raw.item)
    good = _quarantine_rows(
        raw,
        quarantine,
        (
            (missing_user, Reason.MISSING_USER),
            (invalid_keys(raw.user), Reason.INVALID_KEY),
            (missing_item, Reason.MISSING_ITEM),
            (~known, Reason.UNKNOWN_ITEM),
            (bad_rating, Reason.BAD_RATING),
            (bad_timestamp, Reason.BAD_TIMESTAMP),
        ),
    )
    users = raw.user.filter(pa.array(good)).dictionary_encode()
    log = Log(
        user=users.indices.to_numpy().astype(np.int64),
        item=item.fill_null(-1).to_numpy().astype(np.int64)[good],
        rating=rating[good],
        timestamp=timestamp[good],
        has_timestamp=has_timestamp[good],
    )
    return log, users.dictionary


def clean(log: Log, config: InteractionsConfig) -> tuple[Log, dict[str, int]]:
    """Apply the rating threshold, drop repeated pairs, and keep the k-core.

    Returns:
        What is left, in the order of the log, and how many rows each step dropped.

    Raises:
        UserError: nothing is left.
    """
    rows = {"usable": len(log)}
    if config.min_rating is not None:
        log = log.select(log.rating >= config.min_rating)  # NaN compares False: unrated rows go
    rows["below_min_rating"] = rows["usable"] - len(log)
    kept = log.select(distinct_pairs(log, keep=config.duplicates))
    rows["repeated"] = len(log) - len(kept)
    core = kept.select(
        k_core(
            kept.user,
            kept.item,
            min_user=config.min_user_interactions,
            min_item=config.min_item_interactions,
        )
    )
    rows["outside_of_core"] = len(kept) - len(core)
    rows["left"] = len(core)
    if not len(core):
        raise UserError(
            f"no interaction is left of {rows['usable']:,} usable ones (below min_rating "
            f"{rows['below_min_rating']:,}, repeated {rows['repeated']:,}, outside of the core "
            f"{rows['outside_of_core']:,}). Relax data_prep.interactions, and check that the log's "
            f"item keys are those of the item table."
        )
    return core, rows


def distinct_pairs(log: Log, *, keep: str) -> Ints:
    """Return the rows to keep so that no (user, item) occurs twice, in the order of the log.

    Of a pair's rows the last (or first) by time stays, and among equal or unknown times the last
    (first) of the log.
    """
    time = np.where(log.has_timestamp, log.timestamp, np.iinfo(np.int64).min)
    pair = log.user * (int(log.item.max(initial=0)) + 1) + log.item
    order = np.lexsort((time, pair))  # stable: equal times stay in the order of the log
    changes = pair[order][1:] != pair[order][:-1]
    edge = np.ones(1, dtype=bool)
    ends = np.concatenate([changes, edge] if keep == "last" else [edge, changes])[: len(order)]
    return np.sort(order[ends])


def k_core(user: Ints, item: Ints, *, min_user: int, min_item: int) -> Bools:
    """Return the rows of the largest subset in which every user and item occurs often enough.

    Args:
        user: (n,) user numbers from 0.
        item: (n,) item numbers from 0.
        min_user: least rows of a user that stays.
        min_item: least rows of an item that stays.
    """
    kept = np.arange(len(user))
    while len(kept):
        of_user, of_item = user[kept], item[kept]
        enough = (np.bincount(of_user)[of_user] >= min_user) & (
            np.bincount(of_item)[of_item] >= min_item
        )
        if enough.all():
            break
        kept = kept[enough]
    result = np.zeros(len(user), dtype=bool)
    result[kept] = True
    return result


def renumber(values: Ints, num_values: int) -> tuple[Ints, Ints]:
    """Close the gaps in numbers: return the new numbers, and the old number of each new one."""
    present = np.bincount(values, minlength=num_values) > 0
    return (np.cumsum(present) - 1)[values], np.flatnonzero(present)


def to_ratings(
    column: pa.ChunkedArray | None, num_rows: int
) -> tuple[npt.NDArray[np.float32], Bools]:
    """Return ratings (NaN where unknown) and which of them are no usable numbers."""
    if column is None:
        return np.full(num_rows, np.nan, dtype=np.float32), np.zeros(num_rows, dtype=bool)
    numbers, unreadable = _to_numbers(column)
    values = pc.fill_null(numbers.cast(pa.float64(), safe=False), np.nan).to_numpy(
        zero_copy_only=False
    )
    bad = unreadable | (np.abs(values) > _MAX_RATING)  # NaN: unknown, as pandas writes it
    return np.where(bad, np.nan, values).astype(np.float32), bad


def to_timestamps(column: pa.ChunkedArray | None, num_rows: int) -> tuple[Ints, Bools, Bools]:
    """Return times, which of them are known, and which are unreadable.

    Dates and times become seconds since 1970. Numbers of any unit stay as they are, cut to whole
    ones: only their order counts.
    """
    if column is None:
        none = np.zeros(num_rows, dtype=bool)
        return np.zeros(num_rows, dtype=np.int64), none, none
    if pa.types.is_temporal(column.type):
        seconds = column.cast(pa.timestamp("s"), safe=False).cast(pa.int64()).combine_chunks()
        return _filled(seconds), _mask(seconds.is_valid()), np.zeros(num_rows, dtype=bool)
    exact = dates = pa.nulls(num_rows, pa.int64())
    if pa.types.is_string(column.type):
        exact, dates = whole_numbers(column), _to_dates(column)
    numbers, unreadable = _to_numbers(column)
    size = pc.abs(numbers.cast(pa.float64(), safe=False))  # nanoseconds: above 2**53
    overflow = _mask(pc.fill_null(pc.greater_equal(size, _MAX_TIME), False))
    finite = pc.if_else(pc.less(size, _MAX_TIME), numbers, None)  # NaN: unknown
    whole = pc.coalesce(exact, finite.cast(pa.int64(), safe=False), dates)
    bad = (unreadable & ~_mask(dates.is_valid())) | overflow
    return _filled(whole), _mask(whole.is_valid()), bad


def whole_numbers(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of text as int64, null where it is no whole number."""
    matches = pc.extract_regex(_one_array(column), _WHOLE)
    return pc.struct_field(matches, "whole").cast(pa.int64())


def _to_numbers(column: pa.ChunkedArray) -> tuple[pa.Array, Bools]:
    """Return a column as numbers, null where it is empty or unreadable, and what is unreadable."""
    array = _one_array(column)
    if pa.types.is_null(array.type):
        return pa.nulls(len(array), pa.float64()), np.zeros(len(array), dtype=bool)
    if pa.types.is_integer(array.type) or pa.types.is_floating(array.type):
        return array, np.zeros(len(array), dtype=bool)
    if not pa.types.is_string(array.type):
        array = pc.cast(array, pa.string())
    text = pc.utf8_trim_whitespace(array)
    readable = pc.match_substring_regex(text, _NUMBER)
    blank = pc.equal(text, "")
    numbers = pc.if_else(readable, text, None).cast(pa.float64())
    return numbers, _mask(pc.fill_null(pc.invert(pc.or_(readable, blank)), False))


def _to_dates(column: pa.ChunkedArray) -> pa.Array:
    """Return ISO dates and times as seconds, null for everything else."""
    matches = pc.extract_regex(_one_array(column), _DATE)
    day, time, zone = (pc.struct_field(matches, name) for name in ("day", "time", "zone"))
    time = pc.if_else(pc.equal(time, ""), "00:00:00", time)
    zone = pc.if_else(pc.is_in(zone, pa.array(["", "Z"])), "+00:00", zone)
    text = pc.binary_join_element_wise(day, time, zone, " ")
    parsed = pc.strptime(text, format="%Y-%m-%d %H:%M:%S %z", unit="s", error_is_null=True)
    return parsed.cast(pa.int64())


def _quarantine_rows(
    raw: RawLog, quarantine: Quarantine, verdicts: Sequence[tuple[Bools, Reason]]
) -> Bools:
    """List every row under the first verdict that it meets; return the rows that meet none."""
    good = np.ones(len(raw), dtype=bool)
    for mask, reason in verdicts:
        rows = np.flatnonzero(mask & good)
        good &= ~mask
        user, item = (
            pc.utf8_slice_codeunits(pc.fill_null(c.take(pa.array(rows)), ""), 0, MAX_KEY_BYTES)
            for c in (raw.user, raw.item)
        )
        keys = pc.binary_join_element_wise(user, item, " -> ")
        quarantine.add_columns("interactions", keys, reason, row_details(rows))
    return good


def _joined(batches: Sequence[pa.Table], name: str) -> pa.ChunkedArray:
    """Join a column over batches whose types may differ (JSON infers them block by block)."""
    columns = [batch[name] for batch in batches]
    kinds = {column.type for column in columns if not pa.types.is_null(column.type)}
    if len(kinds) <= 1:
        kind = kinds.pop() if kinds else pa.null()
    else:
        numeric = all(pa.types.is_integer(k) or pa.types.is_floating(k) for k in kinds)
        kind = pa.float64() if numeric else pa.string()
    return pa.chunked_array(
        [c for column in columns for c in column.cast(kind, safe=False).chunks], kind
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _filled(array: pa.Array) -> Ints:
    return np.asarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _mask(array: pa.Array) -> Bools:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)


def statistics(log: Log) -> Mapping[str, Any]:
    """Return how active users are and how popular items, for the report."""
    result = {}
    for name, values in (("per_user", log.user), ("per_item", log.item)):
        counts = np.bincount(values)
        counts = counts[counts > 0]
        quantiles = np.quantile(counts, _QUANTILES).round(1).tolist()
        result[name] = {
            "mean": round(float(counts.mean()), 2),
            "quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
        }
    return result
