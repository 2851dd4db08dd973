"""Raw columns of any type in, columns of text, numbers, times or bytes out (files -> tables)."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_INT64_END = 2.0**63
_KEPT = (
    pa.types.is_integer,
    pa.types.is_floating,
    pa.types.is_date,
    pa.types.is_timestamp,
    pa.types.is_null,
)
_UNUSABLE = (
    pa.types.is_nested,
    pa.types.is_time,  # of an unknown day
    pa.types.is_duration,
    pa.types.is_interval,
)


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of any type as valid UTF-8 strings; nulls stay.

    Whole numbers stored as floats (what a missing value makes of integers elsewhere) lose the
    ``.0``, NaN becomes null; lists are joined with commas.
    """
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
        kind = column.type
    if pa.types.is_floating(kind):
        return _float_text(column)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
        return _valid_utf8(column.cast(pa.string()))
    if is_bytes(kind):
        return _valid_utf8(column)
    if pa.types.is_nested(kind):
        return pa.chunked_array([pa.array(map(plain_text, column.to_pylist()), pa.string())])
    return column.cast(pa.string())


def plain_text(value: Any) -> str | None:  # noqa: ANN401 - any value that JSON or parquet holds
    """Return one value as text: lists joined with commas, empty parts left out."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (list, tuple)):
        parts = [plain_text(part) for part in value]
        return ", ".join(part for part in parts if part)
    if isinstance(value, dict):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return str(value)


def plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return numbers, dates and times as they are, everything else as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column if _matches(column.type, _KEPT) else as_text(column)


def is_unusable(kind: pa.DataType) -> bool:
    """Say that a type is no number, date or text."""
    return _matches(kind, _UNUSABLE)


def is_bytes(kind: pa.DataType) -> bool:
    """Say that a type holds plain bytes."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)
    return _matches(kind, (*tests, pa.types.is_fixed_size_binary))


def references_and_bytes(column: pa.ChunkedArray) -> tuple[pa.ChunkedArray, pa.ChunkedArray]:
    """Split a column of pictures into references (text) and contents (bytes).

    It may hold text, bytes, or a struct of both as Hugging Face's datasets write it: {bytes, path}.
    A row that has bytes has no reference.
    """
    kind = column.type
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        data = _large_binary(pc.struct_field(column, "bytes"))
        if kind.get_field_index("path") < 0:
            return pa.chunked_array([pa.nulls(len(column), pa.string())]), data
        path = as_text(_chunked(pc.struct_field(column, "path")))
        return pc.if_else(pc.is_valid(data), None, path), data
    if is_bytes(kind):
        return pa.chunked_array([pa.nulls(len(column), pa.string())]), _large_binary(column)
    return as_text(column), pa.chunked_array([pa.nulls(len(column), pa.large_binary())])


def _large_binary(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    """Return bytes with 64-bit offsets; no bytes at all are none."""
    column = _chunked(column)
    if pa.types.is_null(column.type):
        return column.cast(pa.large_binary())
    if pa.types.is_fixed_size_binary(column.type):
        column = column.cast(pa.binary())
    column = column.cast(pa.large_binary())
    return pc.if_else(pc.equal(pc.binary_length(column), 0), None, column)


def _chunked(column: pa.Array | pa.ChunkedArray) -> pa.ChunkedArray:
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])


def _matches(kind: pa.DataType, tests: Sequence[Callable[[pa.DataType], bool]]) -> bool:
    return any(test(kind) for test in tests)


def _float_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Format value by value, so that a key does not depend on the rows around it."""
    numbers = column.cast(pa.float64())
    numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
    exact = pc.less(pc.abs(numbers), _INT64_END)
    whole = pc.and_(pc.equal(numbers, pc.floor(numbers)), exact)
    integers = pc.if_else(whole, numbers, None).cast(pa.int64()).cast(pa.string())
    return pc.if_else(whole, integers, column.cast(pa.string()))


def _valid_utf8(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Replace invalid bytes; files can hold them although their type says string."""
    try:
        return column.cast(pa.binary()).cast(pa.string())
    except pa.ArrowInvalid:
        values = column.cast(pa.binary()).to_pylist()
        fixed = [None if v is None else v.decode("utf-8", "replace") for v in values]
        return pa.chunked_array([pa.array(fixed, pa.string())])
