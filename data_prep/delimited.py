"""Delimited text (CSV, TSV and the like) in, batches of text columns out (files -> tables)."""

import array
import dataclasses
import io
from collections.abc import Callable, Iterator
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv

from alignrec.errors import UserError
from data_prep.encoding import Utf8Stream
from data_prep.locations import Piece, RawFile
from data_prep.readers import (
    MAX_ROW_BYTES,
    Columns,
    MalformedRow,
    check_columns_present,
    numbered,
    unpacked,
)

_HEADER_BYTES = 1 << 20
_MAX_LINES_OF_A_BAD_ROW = 1000


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


class _BadCsvRows:
    """Rows that pyarrow refuses, and the numbers that they leave to the others."""

    def __init__(self, file: RawFile, *, has_header: bool) -> None:
        self._file = file
        self._header = int(has_header)
        self._expected = 0
        # A block may hold millions of them: 16 bytes each.
        self._waiting = array.array("q")
        self._widths = array.array("q")
        self._swallowing: tuple[int, int] | None = None
        self._numbers = np.zeros(0, dtype=np.int64)  # of bad rows behind the last good one
        self._num_passed = 0

    def skip(self, row: pyarrow.csv.InvalidRow) -> str:
        """Note a row; pyarrow calls this in the order of the file."""
        number, num_lines = row.number - self._header, row.text.count("\n")
        if num_lines > _MAX_LINES_OF_A_BAD_ROW and self._swallowing is None:
            self._swallowing = number, num_lines
        self._expected = row.expected_columns
        self._waiting.append(number)
        self._widths.append(row.actual_columns)
        return "skip"

    def move_to(self, malformed: list[MalformedRow]) -> None:
        """Report the rows that were noted since the last call.

        Raises:
            UserError: one that swallows a large part of the file.
        """
        if self._swallowing is not None:
            number, num_lines = self._swallowing
            raise UserError(
                f"{self._file.url} row {number} goes on for {num_lines:,} lines, which would "
                f"be lost: a quote in it is never closed. Correct that row."
            )
        waiting, widths = self._waiting, self._widths
        self._waiting, self._widths = array.array("q"), array.array("q")
        for number, width in zip(waiting, widths, strict=True):
            detail = f"{width} columns instead of {self._expected}"
            malformed.append(MalformedRow(f"{self._file.url} row {number}", detail))
        self._numbers = np.concatenate([self._numbers, np.array(waiting, dtype=np.int64)])

    def numbers_of_good_rows(self, start: int, count: int) -> npt.NDArray[np.int64]:
        """Return the numbers in the file of the good rows ``start`` to ``start + count``.

        They are asked for in order: what lies before the next good row is forgotten.
        """
        good = np.arange(start + 1, start + count + 2)  # if no row before were bad; and the next
        shifted = self._numbers - self._num_passed - np.arange(len(self._numbers))
        passed = np.searchsorted(shifted, good, side="right")
        numbers = good[:-1] + self._num_passed + passed[:-1]
        self._numbers = self._numbers[passed[-1] :].copy()
        self._num_passed += int(passed[-1])
        return numbers


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
