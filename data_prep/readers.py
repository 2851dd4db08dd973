"""What the readers of all formats share (files -> tables).

Every reader yields the columns in the types of the file, with the number of each row in ``ROW``. A
file is streamed: what is in memory at once is bounded by the size of a block, of a batch, and of
the longest row, for which there is a limit.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alignrec.configuration import nearest
from alignrec.errors import StageFailure, UserError
from data_prep.locations import RawFile, is_foreign

ROW = ":row"  # a name that no table of a user's has
MAX_ROW_BYTES = 16 << 20
_DETAIL_CHARACTERS = 200
_MAX_MALFORMED = 10_000


@dataclasses.dataclass(frozen=True)
class MalformedRow:
    """A row that could not be parsed."""

    where: str
    detail: str


class MalformedRows(list[MalformedRow]):
    """Rows that could not be parsed: a file of nothing else must not fill the memory.

    Attributes:
        total: rows that were added.
    """

    def __init__(self, receive: Callable[[Sequence[MalformedRow]], None] = lambda _: None) -> None:
        """Give rows on to ``receive``, which lets go of them; by default nobody wants them."""
        super().__init__()
        self._receive = receive
        self.total = 0

    def append(self, row: MalformedRow) -> None:
        """Add a row; the list empties itself when it is long."""
        super().append(row)
        self.total += 1
        if len(self) >= _MAX_MALFORMED:
            self.flush()

    def flush(self) -> None:
        """Give on what is left."""
        if self:
            self._receive(self)
            self.clear()


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
    except (pa.ArrowException, UnicodeError, EOFError, RecursionError) as error:
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
