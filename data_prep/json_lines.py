"""JSON lines in, batches of columns out (files -> tables).

pyarrow parses whole blocks; those that it refuses are parsed line by line.
"""

import codecs
import functools
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json

from alignrec.errors import UserError
from data_prep.conversion import MAX_DEPTH, is_deep, plain_text
from data_prep.locations import Piece, RawFile
from data_prep.readers import (
    MAX_ROW_BYTES,
    ROW,
    Columns,
    MalformedRow,
    check_columns_present,
    numbered,
    short,
    unpacked,
)

_SAMPLED_BYTES = 1 << 20
_SAMPLED_LINES = 50


def loads(text: str) -> object:
    """Parse JSON, nested to the same depth wherever it is called from.

    Python's own limit depends on the caller's depth: a line could be a row in one pass and none in
    the next.

    Raises:
        ValueError: no JSON.
        RecursionError: nested deeper than ``MAX_DEPTH``.
    """
    value: object = json.loads(text)
    if text.count("[") + text.count("{") > MAX_DEPTH and is_deep(value):
        raise RecursionError(f"lists or objects nested deeper than {MAX_DEPTH}")
    return value


def read_json_lines(
    piece: Piece,
    columns: Columns,
    malformed: list[MalformedRow],
    *,
    parse: Callable[[str], object] = loads,
) -> Iterator[pa.Table]:
    """Yield the objects of a file with one JSON object per line.

    Which lines are rows does not depend on the columns asked for.

    Args:
        piece: the file.
        columns: what to read.
        malformed: receives the lines that hold no object.
        parse: parser of lines that pyarrow refuses.
    """
    file = piece.file
    seen: set[str] = set()
    named: set[str] = set()
    num_objects = 0
    for first_line, block in line_blocks(file, malformed):
        if first_line == 1 and block.lstrip()[:1] == b"[":
            raise UserError(
                f"{file.url} is one JSON array, not one object per line, so it cannot be read "
                f"piece by piece. Convert it: jq -c '.[]' IN > OUT.jsonl"
            )
        named = named or _names(block)
        table = _parse_block(block, columns, first_line)
        if table is None:
            by_hand = functools.partial(_object, names=columns.names, parse=parse)
            found = list(parsed_lines(file, block, first_line, malformed, parse=by_hand))
            table = _text_table(found, columns)
        num_objects += len(table)
        seen |= set(table.column_names)
        for name in columns.names:
            if name not in table.column_names:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
        if len(table):
            yield table.select([*columns.names, ROW])
    if num_objects:
        check_columns_present(file, columns, sorted((named | seen) - {ROW}))


def line_blocks(file: RawFile, malformed: list[MalformedRow]) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines with the number of their first line, from 1.

    A line above ``MAX_ROW_BYTES`` is reported and passed over without being held.
    """
    first_line, rest, inside_long, started = 1, b"", False, False
    with unpacked(file) as stream:
        while data := stream.read(MAX_ROW_BYTES):
            if inside_long:
                _, newline, data = data.partition(b"\n")
                inside_long = not newline
                first_line += len(newline)
            data = rest + data if started else data.removeprefix(codecs.BOM_UTF8)
            started = True
            end = data.find(b"\n")
            if end > MAX_ROW_BYTES or (end < 0 and len(data) > MAX_ROW_BYTES):
                too_long = f"the line is longer than {MAX_ROW_BYTES:,} bytes"
                malformed.append(MalformedRow(f"{file.url} line {first_line}", too_long))
                inside_long = end < 0
                first_line += int(end >= 0)
                data = data[end + 1 :] if end >= 0 else b""
            lines, newline, rest = data.rpartition(b"\n")
            if newline:
                yield first_line, lines + newline
                first_line += lines.count(b"\n") + 1
    if rest.strip():
        yield first_line, rest + b"\n"


def parsed_lines(
    file: RawFile,
    block: bytes,
    first_line: int,
    malformed: list[MalformedRow],
    *,
    parse: Callable[[str], object],
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a block with their lines' numbers; the other lines are reported.

    Args:
        file: for messages.
        block: whole lines.
        first_line: number of its first line.
        malformed: receives the lines that hold no object.
        parse: text of one line -> object; raises ValueError where there is none.
    """
    for number, line in enumerate(block.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        try:
            row = parse(line.decode("utf-8-sig", "replace"))
            if not isinstance(row, dict):
                raise ValueError("not an object")
        except (ValueError, RecursionError) as error:
            malformed.append(MalformedRow(f"{file.url} line {number}", short(error)))
            continue
        yield number, row


def _parse_block(block: bytes, columns: Columns, first_line: int) -> pa.Table | None:
    """Parse whole lines with pyarrow; None where it refuses (a bad line, mixed types)."""
    lines = object_lines(block)
    if lines is None:
        return None
    for schema in _schemas(block, columns):
        table = parse_with_schema(block, schema)
        if table is None:
            continue
        if len(table) != len(lines):
            return None  # several objects on one line
        # An explicit schema makes columns that no line has: they would hide a misspelt name.
        absent = [
            name
            for name in schema.names
            if table[name].null_count == len(table) and json.dumps(name).encode() not in block
        ]
        return numbered(table.drop_columns(absent), lines + first_line)
    return None


def object_lines(block: bytes) -> npt.NDArray[np.int64] | None:
    """Return the numbers from 0 of the lines that are not blank; None if one begins no object.

    pyarrow crashes on a block that begins with ``null``, so it sees none but such blocks.
    """
    num_lines = block.count(b"\n")
    if block.startswith(b"{") and block.count(b"\n{") + 1 == num_lines:
        return np.arange(num_lines)
    stripped = [line.strip() for line in block.split(b"\n")]
    if any(line and not line.startswith(b"{") for line in stripped):
        return None
    return np.flatnonzero([bool(line) for line in stripped])


def parse_with_schema(block: bytes, schema: pa.Schema) -> pa.Table | None:
    """Parse objects with pyarrow; None where it refuses.

    Args:
        block: objects of JSON (see ``object_lines``).
        schema: the fields wanted; others may hold anything, nested to any depth.
    """
    try:
        return pyarrow.json.read_json(
            io.BytesIO(block),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None


def _schemas(block: bytes, columns: Columns) -> Iterator[pa.Schema]:
    """Yield the types to try: numbers as the first lines have them, then with fractions."""
    text = [pa.field(name, pa.string()) for name in columns.names if name not in columns.other]
    kinds = {name: _kind(block, name) for name in columns.other}
    yield pa.schema([*text, *(pa.field(name, kind) for name, kind in kinds.items())])
    if pa.int64() in kinds.values():
        wider = {n: pa.float64() if k == pa.int64() else k for n, k in kinds.items()}
        yield pa.schema([*text, *(pa.field(name, kind) for name, kind in wider.items())])


def _kind(block: bytes, name: str) -> pa.DataType:
    for row in _sampled(block):
        value = row.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return pa.int64()
        if isinstance(value, float):
            return pa.float64()
        if value is not None:
            break
    return pa.string()


def _names(block: bytes) -> set[str]:
    return {str(name) for row in _sampled(block) for name in row}


def _sampled(block: bytes) -> Iterator[dict[str, Any]]:
    """Yield the first objects of a block that can be parsed."""
    for line in block[:_SAMPLED_BYTES].split(b"\n", _SAMPLED_LINES)[:_SAMPLED_LINES]:
        try:
            row = loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _text_table(rows: Sequence[tuple[int, Mapping[str, Any]]], columns: Columns) -> pa.Table:
    """Return numbered objects as columns of text; columns that none of them has are left out."""
    present = {name for _, row in rows for name in row}
    names = [name for name in columns.names if name in present]
    arrays = [
        pa.array([plain_text(row.get(name)) for _, row in rows], pa.string()) for name in names
    ]
    numbers = pa.array([number for number, _ in rows], pa.int64())
    return pa.table([*arrays, numbers], names=[*names, ROW])


def _object(text: str, names: Sequence[str], parse: Callable[[str], object]) -> object:
    """Parse one line by ``parse``, or, where that has narrower limits, as pyarrow does.

    Otherwise a line with numbers of thousands of digits or very deep lists would be a row for some
    columns and malformed for others.
    """
    try:
        return parse(text)
    except (ValueError, RecursionError):
        line = text.strip().encode("utf-8", "replace")
        everything = parse_with_schema(line, pa.schema([])) if line.startswith(b"{") else None
        if everything is None or len(everything) != 1:
            raise
        parts = [parse_with_schema(line, pa.schema([(name, pa.string())])) for name in names]
        return {key: part[key][0].as_py() for part in parts if part for key in part.column_names}
