"""Raw tables of any format as batches of plain columns (files -> catalogue, interactions).

Columns named as text come as valid UTF-8 strings whatever their type in the file was; other
columns keep numbers, dates and times and turn the rest into text. Rows that cannot be parsed at all
are reported, not raised.
"""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from alignrec.configuration import nearest
from alignrec.errors import UserError
from data_prep.locations import RawFile

_BATCH_ROWS = 65_536
_BLOCK_BYTES = 16 << 20
_DETAIL_CHARACTERS = 200
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


@dataclasses.dataclass(frozen=True)
class MalformedRow:
    """A row that could not be parsed."""

    where: str
    detail: str


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns to read.

    Attributes:
        setting: name of the mapping's section in the recipe, for messages.
        text: columns to return as strings.
        other: columns to return as they are if they hold numbers or dates, else as strings.
    """

    setting: str
    text: tuple[str, ...]
    other: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys((*self.text, *self.other)))


def read_batches(
    files: Sequence[RawFile], columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the rows of all files in order, some ten thousands at a time.

    Args:
        files: parquet, CSV, TSV or JSON lines, by suffix; .gz, .bz2 and .zst are unpacked.
        columns: what to read.
        malformed: receives the rows that cannot be parsed.

    Raises:
        UserError: an unreadable file, an unknown format, or a column that is not there.
    """
    for file in files:
        reader = _READERS.get(file.suffix)
        if reader is None:
            raise UserError(
                f"{file.url}: no reader for the suffix {file.suffix or '(none)'}. Give parquet, "
                f"csv, tsv or jsonl, optionally with .gz, .bz2 or .zst."
            )
        with _damage_named(file):
            for batch in reader(file, columns, malformed):
                yield _as_asked(file, batch, columns)


def column_names(file: RawFile) -> list[str]:
    """Return the names of the columns of a CSV, TSV or parquet file.

    Raises:
        UserError: an unreadable file, or another format.
    """
    if _READERS.get(file.suffix) not in (_read_csv, _read_parquet):
        raise UserError(
            f"{file.url}: the suffix {file.suffix or '(none)'} is none of a table with a header, "
            f"which would say what columns there are. Give inter, csv, tsv or parquet."
        )
    with _damage_named(file), _unpacked(file) as stream:
        if _READERS[file.suffix] is _read_parquet:
            return list(pq.read_schema(stream).names)
        options = _csv_options(file, skip=lambda _: "skip")
        return list(pyarrow.csv.open_csv(stream, parse_options=options).schema.names)


def check_columns(files: Sequence[RawFile], columns: Columns) -> None:
    """Read the beginning of the first file, so that a misspelt column shows before any work.

    Raises:
        UserError: as ``read_batches``.
    """
    next(read_batches(files[:1], columns, []), None)


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
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
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


def _as_asked(file: RawFile, batch: pa.Table, columns: Columns) -> pa.Table:
    arrays = {}
    for name in columns.names:
        column = batch[name]
        if name not in columns.text and _matches(column.type, _UNUSABLE):
            raise UserError(
                f"{file.url}: the column {name!r}, which {columns.setting} names, holds "
                f"{column.type}, and that is no number, date or text. Name another column or "
                f"convert this one."
            )
        arrays[name] = as_text(column) if name in columns.text else _plain(column)
    return pa.table(arrays)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return numbers, dates and times as they are, everything else as text."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column if _matches(column.type, _KEPT) else as_text(column)


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


def _read_parquet(
    file: RawFile,
    columns: Columns,
    malformed: list[MalformedRow],  # noqa: ARG001 - one signature
) -> Iterator[pa.Table]:
    with file.open() as stream:
        table = pq.ParquetFile(stream)
        _check_columns(file, columns, table.schema_arrow.names)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=columns.names):
            yield pa.Table.from_batches([batch])


def _read_csv(file: RawFile, columns: Columns, malformed: list[MalformedRow]) -> Iterator[pa.Table]:
    def skip(row: pyarrow.csv.InvalidRow) -> str:
        malformed.append(
            MalformedRow(
                f"{file.url} row {row.number}",
                f"{row.actual_columns} columns instead of {row.expected_columns}",
            )
        )
        return "skip"

    with _unpacked(file) as stream:
        reader = pyarrow.csv.open_csv(
            stream,
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            parse_options=_csv_options(file, skip=skip),
            # Everything as text: inference would turn the key 007 into 7.
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in columns.names},
                strings_can_be_null=True,
                null_values=[""],
                check_utf8=False,
            ),
        )
        _check_columns(file, columns, reader.schema.names)
        for batch in reader:
            yield pa.Table.from_batches([batch]).select(columns.names)


def _csv_options(
    file: RawFile, *, skip: Callable[[pyarrow.csv.InvalidRow], str]
) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(
        delimiter="\t" if file.suffix in (".tsv", ".inter") else ",",
        newlines_in_values=True,
        invalid_row_handler=skip,
    )


def _read_json_lines(
    file: RawFile, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    seen: set[str] = set()
    first_line = 1
    with _unpacked(file) as stream:
        for block in _line_blocks(stream):
            if first_line == 1 and block.lstrip()[:1] == b"[":
                raise UserError(
                    f"{file.url} is one JSON array, not one object per line, so it cannot be read "
                    f"piece by piece. Convert it: jq -c '.[]' IN > OUT.jsonl"
                )
            table = _parse_json_block(block, columns, f"{file.url} line", first_line, malformed)
            seen |= set(table.column_names)
            missing = [name for name in columns.names if name not in table.column_names]
            for name in missing:
                table = table.append_column(name, pa.nulls(len(table), pa.string()))
            first_line += block.count(b"\n")
            if len(table):
                yield table.select(columns.names)
    _check_columns(file, columns, sorted(seen))


def _parse_json_block(
    block: bytes, columns: Columns, where: str, first_line: int, malformed: list[MalformedRow]
) -> pa.Table:
    """Parse lines with pyarrow; where it refuses (a bad line, mixed types), line by line."""
    schema = pa.schema([pa.field(name, pa.string()) for name in columns.text])
    options = pyarrow.json.ParseOptions(explicit_schema=schema)
    try:
        table = pyarrow.json.read_json(
            io.BytesIO(block), pyarrow.json.ReadOptions(use_threads=False), options
        )
    except pa.ArrowInvalid:
        return _parse_json_lines(block, columns, where, first_line, malformed)
    # An explicit schema makes columns that no line has: they would hide a misspelt name.
    absent = [
        name
        for name in columns.text
        if table[name].null_count == len(table) and json.dumps(name).encode() not in block
    ]
    return table.drop_columns(absent)


def _parse_json_lines(
    block: bytes, columns: Columns, where: str, first_line: int, malformed: list[MalformedRow]
) -> pa.Table:
    rows = []
    present: set[str] = set()
    for number, line in enumerate(block.splitlines(), start=first_line):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not a JSON object")
        except (ValueError, RecursionError) as error:
            malformed.append(MalformedRow(f"{where} {number}", _short(error)))
            continue
        present |= row.keys()
        rows.append([plain_text(row.get(name)) for name in columns.names])
    arrays = [
        pa.array([row[index] for row in rows], pa.string()) for index in range(len(columns.names))
    ]
    return pa.table(arrays, names=columns.names).select([n for n in columns.names if n in present])


def _line_blocks(stream: IO[bytes]) -> Iterator[bytes]:
    """Yield blocks of whole lines."""
    rest = b""
    while piece := stream.read(_BLOCK_BYTES):
        lines, newline, tail = (rest + piece).rpartition(b"\n")
        rest = tail
        if newline:
            yield lines + newline
    if rest.strip():
        yield rest + b"\n"


@contextlib.contextmanager
def _damage_named(file: RawFile) -> Iterator[None]:
    """Turn what pyarrow says of a damaged file into the user's mistake."""
    try:
        yield
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OSError) as error:
        raise UserError(
            f"{file.url} cannot be read as {file.suffix[1:]}: {_short(error)}. The file is "
            f"damaged or of another format; write it again or correct the suffix."
        ) from error


def _unpacked(file: RawFile) -> Any:  # noqa: ANN401 - a pyarrow stream
    if file.compression is None:
        return file.open()
    return pa.CompressedInputStream(pa.PythonFile(file.open(), "r"), file.compression)


def _check_columns(file: RawFile, columns: Columns, present: Sequence[str]) -> None:
    for name in columns.names:
        if name in present:
            if (times := list(present).count(name)) > 1:
                raise UserError(
                    f"{file.url} has {times} columns {name!r}: which of them {columns.setting} "
                    f"names is unclear. Rename or remove the others."
                )
            continue
        close = nearest(name, present)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise UserError(
            f"{file.url} has no column {name!r}, which {columns.setting} names.{hint} Columns "
            f"there: {', '.join(present) or 'none'}."
        )


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:_DETAIL_CHARACTERS]


_READERS = {
    ".parquet": _read_parquet,
    ".pq": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".inter": _read_csv,  # MMRec's tab-separated interactions
    ".jsonl": _read_json_lines,
    ".ndjson": _read_json_lines,
    ".json": _read_json_lines,
}
