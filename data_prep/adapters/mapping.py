"""What the adapters share: a plain reader under other column names, and text out of lists."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alignrec.errors import UserError
from data_prep.conversion import as_text, plain_text
from data_prep.locations import Piece
from data_prep.readers import ROW, Columns, MalformedRow

Reader = Callable[[Piece, Columns, list[MalformedRow]], Iterator[pa.Table]]


def reader_of(piece: Piece, readers: Mapping[str, Reader], source: str) -> Reader:
    """Return the reader for the file's suffix.

    Raises:
        UserError: the dataset has no such files.
    """
    if piece.file.suffix not in readers:
        raise UserError(
            f"{piece.file.url}: {source} has no such file. Give one with the suffix "
            f"{' or '.join(readers)}, packed or not, or set data_prep.source to table."
        )
    return readers[piece.file.suffix]


def read_renamed(
    piece: Piece,
    columns: Columns,
    malformed: list[MalformedRow],
    *,
    reader: Reader,
    names: Mapping[str, str],
    source: str,
) -> Iterator[pa.Table]:
    """Yield what a plain reader finds, under the adapter's names.

    Args:
        piece: what to read.
        columns: the adapter's columns.
        malformed: receives the rows that cannot be parsed.
        reader: of the file's format.
        names: the adapter's name of a column -> its name in the file.
        source: name of the dataset, for messages.
    """
    raw = Columns(
        f"source {source}",
        text=tuple(names[name] for name in columns.names if name not in columns.other),
        other=tuple(names[name] for name in columns.other),
    )
    for table in reader(piece, raw, malformed):
        chosen = {name: table[names[name]] for name in columns.names}
        yield pa.table({**chosen, ROW: table[ROW]})


def joined_lists(column: pa.ChunkedArray, separator: str) -> pa.Array:
    """Return each list of texts as one text; nulls and empty texts are left out."""
    lists = column.combine_chunks()
    values = lists.flatten()
    present = pc.fill_null(pc.greater(pc.binary_length(values), 0), False)
    parents = pc.list_parent_indices(lists).filter(present)
    counts = np.bincount(parents.to_numpy(), minlength=len(lists))
    offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32())
    return pc.binary_join(pa.ListArray.from_arrays(offsets, values.filter(present)), separator)


def text_table(rows: list[Mapping[str, str | None]], names: list[str]) -> pa.Table:
    """Return rows of texts as a table."""
    return pa.table({name: pa.array([row[name] for row in rows], pa.string()) for name in names})


def as_strings(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as text without blanks around it."""
    return pc.utf8_trim_whitespace(as_text(column))


def texts(value: Any) -> Iterator[str]:  # noqa: ANN401 - what a line holds (no deeper than ``loads``)
    """Yield the texts that are not empty of a value, or of nested lists."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from texts(part)
    elif text := plain_text(value):
        yield text
