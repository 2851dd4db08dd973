"""What the readers of all formats share, and the one of parquet files (files -> tables).

Every reader yields the columns in the types of the file, with the number of each row in ``ROW``. A
file is streamed: what is in memory at once is bounded by the size of a block, of a batch, and of
the longest row, for which there is a limit.
"""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.configuration import nearest
from alignrec.errors import StageFailure, UserError
from data_prep.locations import Piece, RawFile, is_foreign

ROW = ":row"  # a name that no table of a user's has
MAX_ROW_BYTES = 16 << 20
_BATCH_ROWS = 65_536
_BATCH_BYTES = 64 << 20
_BUFFER_BYTES = 1 << 20
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


def unpacked(file: RawFile) -> Any:  # noqa: ANN401 - a pyarrow stream
    """Open the file's content, unpacked where its suffix says that it is packed."""
    if file.compression is None:
        return file.open()
    return pa.CompressedInputStream(pa.PythonFile(file.open(), "r"), file.compression)


@contextlib.contextmanager
def damage_named(file: RawFile) -> Iterator[None]:
    """Turn what pyarrow and file systems say of a file into one line that names it.

    Raises:
        UserError: the file is damaged or of another format.
        StageFailure: its server failed; the same command may do better.
    """
    try:
        yield
    except (pa.ArrowException, UnicodeError, EOFError) as error:
        raise _damaged(file, error) from error
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, (TimeoutError, ConnectionError)) or is_foreign(error):
            raise StageFailure(
                f"{file.url} could not be read to its end: {type(error).__name__} {short(error)}. "
                f"Run the same command again; if it fails again, look after that server."
            ) from error
        if isinstance(error, OSError):
            raise _damaged(file, error) from error
        raise


def _damaged(file: RawFile, error: BaseException) -> UserError:
    if "straddling object" in str(error):
        return UserError(
            f"{file.url} has a row longer than {MAX_ROW_BYTES:,} bytes, or a quote that is "
            f"never closed: it cannot be read row by row. Correct that row."
        )
    return UserError(
        f"{file.url} cannot be read as {file.suffix[1:]}: {short(error)}. The file is "
        f"damaged or of another format; write it again or correct the suffix."
    )


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
