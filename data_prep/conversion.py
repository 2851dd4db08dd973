"""Raw columns of any type in, columns of text, numbers, times or bytes out (files -> tables)."""

import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

_INT64_END = 2.0**63
MAX_DEPTH = 100  # of lists and objects in one another; what lies deeper is left out
_SEQUENCES = (list, tuple, set, frozenset)
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


def plain_text(
    value: Any,  # noqa: ANN401 - any value that JSON, a literal or parquet holds
    *,
    depth: int = MAX_DEPTH,
) -> str | None:
    """Return one value as text: lists joined with commas, empty parts left out; never raise."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, str):
        return _encodable(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, int):
        return _digits(value)
    if isinstance(value, _SEQUENCES):
        parts = [plain_text(part, depth=depth - 1) for part in value] if depth else []
        ordered = sorted(filter(None, parts)) if isinstance(value, (set, frozenset)) else parts
        return ", ".join(part for part in ordered if part)
    if isinstance(value, dict):
        plain_value = _as_json(value, depth)
        return _encodable(json.dumps(plain_value, ensure_ascii=False, sort_keys=True))
    return _encodable(str(value))


def is_deep(value: object) -> bool:
    """Say whether lists and objects lie in one another deeper than ``MAX_DEPTH``."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for outer in level
            for part in _parts(outer)
            if isinstance(part, (dict, *_SEQUENCES))
        ]
        if not level:
            return False
    return True


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


def _parts(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return (*value, *value.values())
    return value if isinstance(value, _SEQUENCES) else ()


def _as_json(value: Any, depth: int) -> Any:  # noqa: ANN401 - any value
    """Return a value that JSON can hold: keys and other types become text."""
    if isinstance(value, dict) and depth:
        return {
            plain_text(key, depth=depth - 1) or "": _as_json(part, depth - 1)
            for key, part in value.items()
        }
    if isinstance(value, (list, tuple)) and depth:
        return [_as_json(part, depth - 1) for part in value]
    if isinstance(value, (dict, list, tuple)):
        return None
    if value is None or isinstance(value, (str, bool, float)):
        return value
    if isinstance(value, int) and abs(value) < _INT64_END:
        return value
    return plain_text(value, depth=depth)


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # thousands of digits, for which Python's str() has a limit
        return hex(value)


def _encodable(text: str) -> str:
    """Replace lone surrogates."""
    return text.encode("utf-8", "replace").decode()


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
