"""Amazon product data of 2014: meta_*.json.gz, reviews_*.json.gz and ratings_*.csv.

A line of the meta files is a Python literal ({'asin': '...'}); some copies hold JSON. Neither is
ever evaluated: ``ast.literal_eval`` reads constants only.
"""

import ast
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.adapters.mapping import Reader, read_renamed, reader_of, text_table, texts
from data_prep.conversion import is_deep, plain_text
from data_prep.delimited import CsvFormat, read_csv
from data_prep.json_lines import line_blocks, loads, parsed_lines, read_json_lines
from data_prep.locations import Piece
from data_prep.readers import ROW, Columns, MalformedRow, numbered

_SOURCE = "amazon2014"
_ICONS = "/x-site/icons/"
_MAX_LITERAL_CHARACTERS = 1 << 20  # the parser takes some hundred times that in memory
_REVIEWS = {
    "user_id": "reviewerID",
    "item_id": "asin",
    "rating": "overall",
    "timestamp": "unixReviewTime",
}
_RATINGS = CsvFormat(names=("user_id", "item_id", "rating", "timestamp"))
_ITEM_NAMES = ["item_id", "title", "brand", "categories", "description", "image"]


def read_items(piece: Piece, columns: Columns, malformed: list[MalformedRow]) -> Iterator[pa.Table]:
    """Yield the products of a meta file."""
    for first_line, block in line_blocks(piece.file, malformed):
        found = list(parsed_lines(piece.file, block, first_line, malformed, parse=literal))
        if found:
            rows, values = zip(*found, strict=True)
            table = text_table([_item(row) for row in values], _ITEM_NAMES)
            yield numbered(table.select(columns.names), np.array(rows, dtype=np.int64))


def read_interactions(
    piece: Piece, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the ratings of a reviews file, or of a ratings file without a header."""
    readers: dict[str, Reader] = {
        ".json": functools.partial(
            read_renamed,
            reader=functools.partial(read_json_lines, parse=literal),
            names=_REVIEWS,
            source=_SOURCE,
        ),
        ".csv": _read_ratings,
    }
    readers[".jsonl"] = readers[".json"]
    yield from reader_of(piece, readers, _SOURCE)(piece, columns, malformed)


def literal(text: str) -> object:
    """Return the value that a line of JSON or a Python literal stands for.

    Raises:
        ValueError: it is neither, or too long or too deep.
    """
    line = text.strip()
    if line.startswith('{"'):
        try:
            return loads(line)
        except (ValueError, RecursionError):
            pass  # a Python literal may begin like that as well
    if len(line) > _MAX_LITERAL_CHARACTERS:
        raise ValueError(f"longer than {_MAX_LITERAL_CHARACTERS:,} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a text is none of our business
            value: object = ast.literal_eval(line)
    except (SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError(f"no literal: {error}") from error
    if is_deep(value):
        raise ValueError("no literal: lists nested too deep")
    return value


def _item(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        "item_id": plain_text(row.get("asin")),
        "title": plain_text(row.get("title")),
        "brand": plain_text(row.get("brand")),
        "categories": ", ".join(dict.fromkeys(texts(row.get("categories")))),
        "description": " ".join(texts(row.get("description"))),
        "image": _picture(row.get("imUrl")),
    }


def _picture(value: object) -> str | None:
    """Return the address of a product's picture; Amazon's icon for "no picture" is none."""
    address = plain_text(value)
    return None if not address or _ICONS in address else address


def _read_ratings(
    piece: Piece, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Read user, item, rating, time; copies from elsewhere may have a header after all."""
    wanted = Columns(columns.setting, text=("rating", *columns.names))
    for table in read_csv(piece, wanted, malformed, dialect=_RATINGS):
        number = pc.match_substring_regex(pc.fill_null(table["rating"], ""), r"^\s*[0-9.]")
        is_header = pc.and_(pc.equal(table[ROW], 1), pc.invert(number))
        yield table.filter(pc.invert(is_header)).select([*columns.names, ROW])
