"""H&M Personalized Fashion Recommendations: articles, images/0xx/0xxxxxxxxx.jpg, transactions."""

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from data_prep.adapters.mapping import as_strings, read_renamed, reader_of
from data_prep.delimited import read_csv
from data_prep.locations import Piece
from data_prep.parquet import read_parquet
from data_prep.readers import ROW, Columns, MalformedRow

_SOURCE = "hm"
_KEY_DIGITS = 10
_FOLDER_DIGITS = 3
_READERS = {".csv": read_csv, ".parquet": read_parquet}
_ARTICLES = {
    "item_id": "article_id",
    "name": "prod_name",
    "product_type": "product_type_name",
    "colour": "colour_group_name",
    "department": "department_name",
    "description": "detail_desc",
    "image": "article_id",
}
_TRANSACTIONS = {"user_id": "customer_id", "item_id": "article_id", "timestamp": "t_dat"}


def read_items(piece: Piece, columns: Columns, malformed: list[MalformedRow]) -> Iterator[pa.Table]:
    """Yield the articles with the path of their picture."""
    for table in _read(piece, columns, malformed, _ARTICLES):
        found = {name: table[name] for name in columns.names}
        for name in {"item_id", "image"} & set(found):
            found[name] = _keys(found[name])
        if "image" in found:
            found["image"] = _picture_paths(found["image"])
        yield pa.table({**found, ROW: table[ROW]})


def read_interactions(
    piece: Piece, columns: Columns, malformed: list[MalformedRow]
) -> Iterator[pa.Table]:
    """Yield the purchases; their day is their time."""
    for table in _read(piece, columns, malformed, _TRANSACTIONS):
        found = {name: table[name] for name in columns.names}
        if "item_id" in found:
            found["item_id"] = _keys(found["item_id"])
        yield pa.table({**found, ROW: table[ROW]})


def _read(
    piece: Piece, columns: Columns, malformed: list[MalformedRow], names: dict[str, str]
) -> Iterator[pa.Table]:
    reader = reader_of(piece, _READERS, _SOURCE)
    yield from read_renamed(piece, columns, malformed, reader=reader, names=names, source=_SOURCE)


def _keys(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return article numbers with their leading zero, which copies read as numbers have lost."""
    text = as_strings(column)
    return pc.if_else(pc.equal(text, ""), text, pc.utf8_lpad(text, _KEY_DIGITS, "0"))


def _picture_paths(keys: pa.ChunkedArray) -> pa.ChunkedArray:
    folder = pc.utf8_slice_codeunits(keys, 0, _FOLDER_DIGITS)
    path = pc.binary_join_element_wise("images", folder, keys, "/")
    return pc.binary_join_element_wise(path, ".jpg", "")
