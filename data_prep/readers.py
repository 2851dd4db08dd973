"""One raw file as batches of the columns asked for, format by format (files -> tables).

Every reader yields the columns in the types of the file, with the number of each row in ``ROW``. A
file is streamed: what is in memory at once is bounded by the size of a block, of a batch, and of
the longest row, for which there is a limit.
"""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from alignrec.configuration import nearest
from alignrec.errors import UserError
from data_prep.conversion import plain_text
from data_prep.encoding import Utf8Stream
from data_prep.locations import Piece, RawFile

ROW = ":row"  # a name that no table of a user's has
MAX_ROW_BYTES = 16 << 20
_BATCH_ROWS = 65_536
_BATCH_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 1 << 20
_MAX_LINES_OF_A_BAD_ROW = 1000
_SAMPLED_LINES = 50
_DETAIL_CHARACTERS = 200


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
        binary: columns of pictures, as references (text) or contents (bytes): returned as two.
    """

    setting: str
    text: tuple[str, ...]
    other: tuple[str, ...] = ()
    binary: tuple[str, ...] = ()

    @property
    def names(self) -> list[str]:
        """All columns, each once."""
        return list(dict.fromkeys((*self.text, *self.other, *self.binary)))


@dataclasses.dataclass(frozen=True)
class CsvFormat:
    """A dialect of delimited text.

    Attributes:
        delimiter: one character.
        quoted: values may stand in double quotes.
        names: names of the columns where the file has no header.
        separator: what stands for the delimiter in the file, where that is another text.
        latin_1: bytes that are not UTF-8 are Latin-1; otherwise they are replaced.
    """

    delimiter: str = ","
    quoted: bool = True
    names: tuple[str, ...] | None = None
    separator: str | None = None
    latin_1: bool = False


COMMAS, TABS = CsvFormat(), CsvFormat(delimiter="\t")


def read_parquet(
    piece: Piece,
    columns: Columns,
    malformed: list[MalformedRow],  # noqa: ARG001 - one signature
) -> Iterator[pa.Table]:
    """Yield the rows of a parquet file, or of some of its row groups."""
    file = piece.file
    with file.open() as stream:
        table = pq.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
        check_columns_present(file, columns, table.schema_arrow.names)
        row = piece.first_row + 1
        for batch in table.iter_batches(
            batch_size=_batch_rows(table.metadata, columns),
            row_groups=list(piece.row_groups or range(table.num_row_groups)),
            columns=columns.names,
        ):
            yield numbered(pa.Table.from_batches([batch]), np.arange(row, row + len(batch)))
            row += len(batch)


def read_csv(
    piece: Piece, columns: Columns, malformed: list[MalformedRow], *, dialect: CsvFormat = COMMAS
) -> Iterator[pa.Table]:
    """Yield the rows of a delimited text file; every value is text.

    Raises:
        UserError: a row above ``MAX_ROW_BYTES``, or a quote that is never closed.
    """
    file = piece.file
    check_columns_present(file, columns, csv_names(file, dialect))
    bad = _BadCsvRows(file, has_header=dialect.names is None)
    with unpacked(file) as stream:
        reader = pyarrow.csv.open_csv(
            _as_utf8(stream, file, dialect),
            read_options=pyarrow.csv.ReadOptions(
                use_threads=False, block_size=MAX_ROW_BYTES, column_names=dialect.names
            ),
            parse_options=_csv_options(dialect, bad.skip),
            # Everything as text: inference would turn the key 007 into 7.
            convert_options=pyarrow.csv.ConvertOptions(
                column_types={name: pa.string() for name in columns.names},
                include_columns=columns.names,
                strings_can_be_null=True,
                null_values=[""],
                check_utf8=False,
            ),
        )
        start = 0
        for batch in reader:
            bad.move_to(malformed)
            rows = bad.numbers_of_good_rows(start, len(batch))
            start += len(batch)
            yield numbered(pa.Table.from_batches([batch]), rows)
        bad.move_to(malformed)


def csv_names(file: RawFile, dialect: CsvFormat) -> list[str]:
    """Return the names of the columns of a delimited text file."""
    if dialect.names is not None:
        return list(dialect.names)
    with unpacked(file) as stream:
        reader = pyarrow.csv.open_csv(
            io.BytesIO(_as_utf8(stream, file, dialect).read(_HEADER_BYTES)),
            read_options=pyarrow.csv.ReadOptions(use_threads=False, block_size=_HEADER_BYTES),
            parse_options=_csv_options(dialect, lambda _: "skip"),
            convert_options=pyarrow.csv.ConvertOptions(check_utf8=False),
        )
        return list(reader.schema.names)


def read_json_lines(
    piece: Piece, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the objects of a file with one JSON object per line."""
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
        lines = np.flatnonzero([bool(line.strip()) for line in block.split(b"\n")]) + first_line
        table = _parse_block(block, columns, lines)
        if table is None:
            table = _parse_lines(file, block, columns, first_line, malformed)
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
    first_line, rest, inside_long = 1, b"", False
    with unpacked(file) as stream:
        while data := stream.read(MAX_ROW_BYTES):
            if inside_long:
                _, newline, data = data.partition(b"\n")
                inside_long = not newline
                first_line += len(newline)
            data = rest + data
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


def unpacked(file: RawFile) -> Any:  # noqa: ANN401 - a pyarrow stream
    """Open the file's content, unpacked where its suffix says that it is packed."""
    if file.compression is None:
        return file.open()
    return pa.CompressedInputStream(pa.PythonFile(file.open(), "r"), file.compression)


@contextlib.contextmanager
def damage_named(file: RawFile) -> Iterator[None]:
    """Turn what pyarrow and fsspec say of a damaged file into the user's mistake."""
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, UnicodeError, EOFError) as error:
        if "straddling object" in str(error):
            raise UserError(
                f"{file.url} has a row longer than {MAX_ROW_BYTES:,} bytes, or a quote that is "
                f"never closed: it cannot be read row by row. Correct that row."
            ) from error
        raise UserError(
            f"{file.url} cannot be read as {file.suffix[1:]}: {short(error)}. The file is "
            f"damaged or of another format; write it again or correct the suffix."
        ) from error


def check_columns_present(file: RawFile, columns: Columns, present: Sequence[str]) -> None:
    """Refuse a file without a column, or with two of its name.

    Raises:
        UserError: naming the column.
    """
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


def numbered(table: pa.Table, rows: npt.NDArray[np.int64]) -> pa.Table:
    """Return the table with the numbers of its rows."""
    return table.append_column(ROW, pa.array(rows, pa.int64()))


def short(error: BaseException) -> str:
    """Return an error's message on one line of bounded length."""
    return " ".join(str(error).split())[:_DETAIL_CHARACTERS]


class _BadCsvRows:
    """Rows that pyarrow refuses, and the numbers that they leave to the others."""

    def __init__(self, file: RawFile, *, has_header: bool) -> None:
        self._file = file
        self._header = int(has_header)
        self._waiting: list[tuple[int, str, int]] = []
        self._numbers: list[int] = []

    def skip(self, row: pyarrow.csv.InvalidRow) -> str:
        """Note a row; pyarrow calls this in the order of the file."""
        detail = f"{row.actual_columns} columns instead of {row.expected_columns}"
        self._waiting.append((row.number - self._header, detail, row.text.count("\n")))
        return "skip"

    def move_to(self, malformed: list[MalformedRow]) -> None:
        """Report the rows that were noted since the last call.

        Raises:
            UserError: one that swallows a large part of the file.
        """
        for number, detail, num_lines in self._waiting:
            if num_lines > _MAX_LINES_OF_A_BAD_ROW:
                raise UserError(
                    f"{self._file.url} row {number} goes on for {num_lines:,} lines, which would "
                    f"be lost: a quote in it is never closed. Correct that row."
                )
            malformed.append(MalformedRow(f"{self._file.url} row {number}", detail))
            self._numbers.append(number)
        self._waiting.clear()

    def numbers_of_good_rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return the numbers in the file of the good rows ``start`` to ``start + count``."""
        bad = np.array(self._numbers, dtype=np.int64)
        good = np.arange(start + 1, start + count + 1)  # if no row before were bad
        shifted = bad - np.arange(len(bad))
        return good + np.searchsorted(shifted, good, side="right")


def _as_utf8(stream: IO[bytes], file: RawFile, dialect: CsvFormat) -> Utf8Stream:
    swap = None if dialect.separator is None else (dialect.separator, dialect.delimiter)
    return Utf8Stream(stream, file.url, swap=swap, latin_1=dialect.latin_1)


def _csv_options(
    dialect: CsvFormat, skip: Callable[[pyarrow.csv.InvalidRow], str]
) -> pyarrow.csv.ParseOptions:
    return pyarrow.csv.ParseOptions(
        delimiter=dialect.delimiter,
        quote_char='"' if dialect.quoted else False,
        newlines_in_values=dialect.quoted,
        invalid_row_handler=skip,
    )


def _batch_rows(metadata: pq.FileMetaData, columns: Columns) -> int:
    """Return how many rows fit into a batch of bounded size, on average."""
    if not metadata.num_rows:
        return _BATCH_ROWS
    num_bytes = 0
    for group in range(metadata.num_row_groups):
        of_group = metadata.row_group(group)
        for index in range(of_group.num_columns):
            column = of_group.column(index)
            if column.path_in_schema.partition(".")[0] in columns.names:
                num_bytes += column.total_uncompressed_size
    return max(1, min(_BATCH_ROWS, int(_BATCH_BYTES / max(num_bytes / metadata.num_rows, 1))))


def _parse_block(block: bytes, columns: Columns, lines: npt.NDArray[np.int64]) -> pa.Table | None:
    """Parse whole lines with pyarrow; None where it refuses (a bad line, mixed types)."""
    for schema in _schemas(block, columns):
        try:
            table = pyarrow.json.read_json(
                io.BytesIO(block),
                pyarrow.json.ReadOptions(use_threads=False, block_size=len(block) + 1),
                # What is not asked for may hold anything, nested to any depth.
                pyarrow.json.ParseOptions(
                    explicit_schema=schema, unexpected_field_behavior="ignore"
                ),
            )
        except pa.ArrowInvalid:
            continue
        if len(table) != len(lines):
            return None  # several objects on one line
        # An explicit schema makes columns that no line has: they would hide a misspelt name.
        absent = [
            name
            for name in schema.names
            if table[name].null_count == len(table) and json.dumps(name).encode() not in block
        ]
        return numbered(table.drop_columns(absent), lines)
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
    for line in block[:_HEADER_BYTES].split(b"\n", _SAMPLED_LINES)[:_SAMPLED_LINES]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _parse_lines(
    file: RawFile,
    block: bytes,
    columns: Columns,
    first_line: int,
    malformed: list[MalformedRow],
) -> pa.Table:
    """Parse line by line; all values become text."""
    rows: list[list[str | None]] = []
    numbers: list[int] = []
    present: set[str] = set()
    for number, row in parsed_lines(file, block, first_line, malformed, parse=json.loads):
        present |= row.keys()
        rows.append([plain_text(row.get(name)) for name in columns.names])
        numbers.append(number)
    arrays = [
        pa.array([row[index] for row in rows], pa.string()) for index in range(len(columns.names))
    ]
    table = pa.table(arrays, names=columns.names)
    table = table.select([name for name in columns.names if name in present])
    return numbered(table, np.array(numbers, dtype=np.int64)) if len(rows) else pa.table({ROW: []})


def parsed_lines(
    file: RawFile,
    block: bytes,
    first_line: int,
    malformed: list[MalformedRow],
    *,
    parse: Callable[[str], Any],
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
