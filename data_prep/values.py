"""Columns of a log as text or numbers in, ratings and times out (sources -> log)."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_WHOLE = r"^\s*(?P<whole>-?[0-8]?\d{1,18})(?:\.0*)?\s*$"  # what int64 surely holds
_DATE = (
    r"^\s*(?P<day>\d{4}-\d{2}-\d{2})"
    r"(?:[T ](?P<time>\d{2}:\d{2}:\d{2})(?:\.\d+)?(?P<zone>Z|[+-]\d{2}:?\d{2})?)?\s*$"
)
_DAY_FORMAT = "%Y-%m-%d"
_MAX_RATING = 1e9
_MAX_TIME = 2.0**62


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
    # strptime makes the 3rd of March of the 31st of February.
    real = pc.strptime(day, format=_DAY_FORMAT, unit="s", error_is_null=True)
    day = pc.if_else(pc.equal(pc.strftime(real, format=_DAY_FORMAT), day), day, None)
    time = pc.if_else(pc.equal(time, ""), "00:00:00", time)
    zone = pc.if_else(pc.is_in(zone, pa.array(["", "Z"])), "+00:00", zone)
    text = pc.binary_join_element_wise(day, time, zone, " ")
    parsed = pc.strptime(text, format=f"{_DAY_FORMAT} %H:%M:%S %z", unit="s", error_is_null=True)
    return parsed.cast(pa.int64())


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _filled(array: pa.Array) -> Ints:
    return np.asarray(pc.fill_null(array, 0).to_numpy(zero_copy_only=False), dtype=np.int64)


def _mask(array: pa.Array) -> Bools:
    return np.asarray(array.to_numpy(zero_copy_only=False), dtype=bool)
