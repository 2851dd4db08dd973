"""Raw tables of any format as batches of plain columns (files -> catalogue, interactions).

Columns named as text come as valid UTF-8 strings whatever their type in the file was; other
columns keep numbers, dates and times and turn the rest into text; columns of pictures come as
references and bytes. Rows that cannot be parsed at all are reported, not raised.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.errors import UserError
from data_prep import adapters, delimited, json_lines
from data_prep.conversion import as_text, is_unusable, plain, references_and_bytes
from data_prep.delimited import COMMAS, TABS
from data_prep.locations import Piece, RawFile
from data_prep.parquet import read_parquet
from data_prep.readers import ROW, Columns, MalformedRow, MalformedRows, damage_named

__all__ = [
    "ROW", "Columns", "MalformedRow", "MalformedRows", "as_text", "bytes_column", "check_columns",
    "column_names", "pieces", "read_batches",
]  # fmt: skip
PIECE_BYTES = 256 << 20

Reader = Callable[[Piece, Columns, list[MalformedRow]], Iterator[pa.Table]]
_read_tabs = functools.partial(delimited.read_csv, dialect=TABS)
_READERS: dict[str, Reader] = {
    ".parquet": read_parquet,
    ".pq": read_parquet,
    ".csv": delimited.read_csv,
    ".tsv": _read_tabs,
    ".inter": _read_tabs,  # MMRec's tab-separated interactions
    ".jsonl": json_lines.read_json_lines,
    ".ndjson": json_lines.read_json_lines,
    ".json": json_lines.read_json_lines,
    **adapters.READERS,
}


def read_batches(
    parts: Sequence[RawFile | Piece], columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the rows of all files in order, at most some ten thousands at a time.

    Args:
        parts: files or pieces of them: parquet, CSV, TSV or JSON lines, by suffix; .gz, .bz2 and
            .zst are unpacked.
        columns: what to read.
        malformed: receives the rows that cannot be parsed.

    Yields:
        The columns asked for, the bytes of binary ones (see ``bytes_column``), and ``ROW``: the
        row's number in its file from 1 (of JSON lines the line, of CSV the record without the
        header; malformed rows count).

    Raises:
        UserError: an unreadable file, an unknown format, or a column that is not there.
    """
    for part in parts:
        piece = part if isinstance(part, Piece) else Piece(part)
        reader = _reader(piece.file)
        with damage_named(piece.file):
            for batch in reader(piece, columns, malformed):
                yield _as_asked(piece.file, batch, columns)


def pieces(files: Sequence[RawFile], *, max_bytes: int = PIECE_BYTES) -> list[Piece]:
    """Divide files into pieces that can be read in parallel; in order they are the files' rows.

    Large parquet files are divided between row groups. Other formats cannot be entered in the
    middle: one piece a file.

    Args:
        files: any tables.
        max_bytes: size of a piece where the row groups allow it.
    """
    result: list[Piece] = []
    for file in files:
        if _reader(file) is read_parquet and file.size > max_bytes:
            result += _row_groups(file, max_bytes)
        else:
            result.append(Piece(file))
    return result


def bytes_column(name: str) -> str:
    """Return the name under which a binary column's bytes come."""
    return f"{name}:bytes"


def column_names(file: RawFile) -> list[str]:
    """Return the names of the columns of a CSV, TSV or parquet file.

    Raises:
        UserError: an unreadable file, or another format.
    """
    reader = _READERS.get(file.suffix)
    with damage_named(file):
        if reader is read_parquet:
            with file.open() as stream:
                return list(pq.read_schema(stream).names)
        if reader in (delimited.read_csv, _read_tabs):
            return delimited.csv_names(file, COMMAS if reader is delimited.read_csv else TABS)
    raise UserError(
        f"{file.url}: the suffix {file.suffix or '(none)'} is none of a table with a header, "
        f"which would say what columns there are. Give inter, csv, tsv or parquet."
    )


def check_columns(files: Sequence[RawFile], columns: Columns) -> None:
    """Read the beginning of the first file, so that a misspelt column shows before any work.

    Raises:
        UserError: as ``read_batches``.
    """
    next(read_batches(files[:1], columns, MalformedRows()), None)


def _reader(file: RawFile) -> Reader:
    reader = _READERS.get(file.format or file.suffix)
    if reader is None:
        raise UserError(
            f"{file.url}: no reader for the suffix {file.suffix or '(none)'}. Give parquet, "
            f"csv, tsv or jsonl, optionally with .gz, .bz2 or .zst."
        )
    return reader


def _row_groups(file: RawFile, max_bytes: int) -> Iterator[Piece]:
    with damage_named(file), file.open() as stream:
        metadata = pq.read_metadata(stream)
        sizes = [
            (group.num_rows, group.total_byte_size)
            for group in map(metadata.row_group, range(metadata.num_row_groups))
        ]
    # Row groups say their size unpacked; what counts here is their share of the file.
    scale = file.size / max(sum(size for _, size in sizes), 1)
    chosen: list[int] = []
    first_row = num_rows = num_bytes = 0
    for index, (rows, size) in enumerate(sizes):
        if chosen and num_bytes + size * scale > max_bytes:
            yield Piece(file, tuple(chosen), first_row)
            chosen, first_row, num_rows, num_bytes = [], first_row + num_rows, 0, 0
        chosen.append(index)
        num_rows += rows
        num_bytes += int(size * scale)
    if chosen:
        yield Piece(file, tuple(chosen), first_row)


def _as_asked(file: RawFile, batch: pa.Table, columns: Columns) -> pa.Table:
    arrays = {}
    for name in columns.names:
        column = batch[name]
        if name in columns.binary:
            arrays[name], arrays[bytes_column(name)] = references_and_bytes(column)
        elif name in columns.text:
            arrays[name] = as_text(column)
        elif is_unusable(column.type):
            raise UserError(
                f"{file.url}: the column {name!r}, which {columns.setting} names, holds "
                f"{column.type}, and that is no number, date or text. Name another column or "
                f"convert this one."
            )
        else:
            arrays[name] = plain(column)
    return pa.table({**arrays, ROW: batch[ROW]})
