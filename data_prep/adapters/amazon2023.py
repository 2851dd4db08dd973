"""Amazon Reviews 2023: meta_*.jsonl and the same as parquet; the reviews need no adapter.

An item is a parent_asin, the product that colours and sizes are variants of.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from data_prep.adapters.mapping import joined_lists, reader_of, text_table, texts
from data_prep.conversion import plain_text
from data_prep.json_lines import (
    line_blocks,
    loads,
    object_lines,
    parse_with_schema,
    parsed_lines,
)
from data_prep.locations import Piece
from data_prep.parquet import read_parquet
from data_prep.readers import ROW, Columns, MalformedRow, numbered

_SOURCE = "amazon2023"
_SIZES = ("large", "hi_res", "thumb")  # the first that is there; hi_res is larger than we need
_MAIN = "MAIN"
_TEXTS = pa.list_(pa.string())
_PICTURE = pa.struct([(name, pa.string()) for name in (*_SIZES, "variant")])
_SCHEMA = pa.schema(
    {
        "parent_asin": pa.string(),
        "title": pa.string(),
        "store": pa.string(),
        "categories": _TEXTS,
        "features": _TEXTS,
        "description": _TEXTS,
        "images": pa.list_(_PICTURE),
    }
)
_ITEM_NAMES = ["item_id", "title", "brand", "categories", "description", "image"]


def read_items(piece: Piece, columns: Columns, malformed: list[MalformedRow]) -> Iterator[pa.Table]:
    """Yield the products of a meta file."""
    readers = {".jsonl": _read_lines, ".json": _read_lines, ".parquet": _read_parquet}
    for table in reader_of(piece, readers, _SOURCE)(piece, columns, malformed):
        yield table.select([*columns.names, ROW])


def _read_lines(
    piece: Piece,
    columns: Columns,  # noqa: ARG001 - one signature
    malformed: list[MalformedRow],
) -> Iterator[pa.Table]:
    for first_line, block in line_blocks(piece.file, malformed):
        lines = object_lines(block)
        raw = None if lines is None else parse_with_schema(block, _SCHEMA)
        if lines is not None and raw is not None and len(raw) == len(lines):
            yield numbered(_items(raw), lines + first_line)
            continue
        found = list(parsed_lines(piece.file, block, first_line, malformed, parse=loads))
        if found:
            rows, values = zip(*found, strict=True)
            table = text_table([_item(row) for row in values], _ITEM_NAMES)
            yield numbered(table, np.array(rows, dtype=np.int64))


def _read_parquet(
    piece: Piece,
    columns: Columns,  # noqa: ARG001 - one signature
    malformed: list[MalformedRow],
) -> Iterator[pa.Table]:
    wanted = Columns(f"source {_SOURCE}", text=tuple(_SCHEMA.names))
    for raw in read_parquet(piece, wanted, malformed):
        yield _items(raw).append_column(ROW, raw[ROW])


def _items(raw: pa.Table) -> pa.Table:
    """Turn the columns of the file into ours, all rows at once."""
    parts = [joined_lists(raw[name], " ") for name in ("features", "description")]
    space = pc.if_else(pc.and_(*[pc.not_equal(part, "") for part in parts]), " ", "")
    columns = {
        "item_id": raw["parent_asin"],
        "title": raw["title"],
        "brand": raw["store"],
        "categories": joined_lists(raw["categories"], ", "),
        "description": pc.binary_join_element_wise(parts[0], space, parts[1], ""),
        "image": _best_pictures(raw["images"]),
    }
    return pa.table({name: columns[name] for name in _ITEM_NAMES})


def _best_pictures(column: pa.ChunkedArray) -> pa.Array:
    """Return the URL of each row's main picture, else of its first; null where there is none."""
    parent, pictures = _pictures(column)
    url = pa.nulls(len(parent), pa.string())
    for size in _SIZES:
        found = pictures[size]
        url = pc.coalesce(url, pc.if_else(pc.equal(found, ""), None, found))
    is_main = _mask(pc.equal(pictures["variant"], _MAIN))
    usable = np.flatnonzero(_mask(url.is_valid()))
    order = usable[np.lexsort((~is_main[usable], parent[usable]))]  # stable: first of equals
    rows, first = np.unique(parent[order], return_index=True)
    chosen = np.full(len(column), -1, dtype=np.int64)
    chosen[rows] = order[first]
    return url.take(pa.array(chosen, mask=chosen < 0))


def _pictures(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], dict[str, pa.Array]]:
    """Return the row of each picture, and its fields.

    JSON has a list of structs; Hugging Face's parquet files have a struct of lists.
    """
    names = (*_SIZES, "variant")
    array = column.combine_chunks()
    if pa.types.is_struct(array.type):
        lists = {name: pc.struct_field(array, name) for name in names}
        parent = pc.list_parent_indices(lists["variant"]).to_numpy()
        return parent, {name: values.flatten() for name, values in lists.items()}
    pictures = array.flatten()
    parent = pc.list_parent_indices(array).to_numpy()
    return parent, {name: pc.struct_field(pictures, name) for name in names}


def _item(row: dict[str, Any]) -> dict[str, str | None]:
    return {
        "item_id": plain_text(row.get("parent_asin")),
        "title": plain_text(row.get("title")),
        "brand": plain_text(row.get("store")),
        "categories": ", ".join(texts(row.get("categories"))),
        "description": " ".join(texts([row.get("features"), row.get("description")])),
        "image": _best_picture(row.get("images")),
    }


def _best_picture(pictures: object) -> str | None:
    found = [p for p in pictures if isinstance(p, dict)] if isinstance(pictures, list) else []
    for picture in sorted(found, key=lambda p: p.get("variant") != _MAIN):  # stable
        for size in _SIZES:
            if isinstance(url := picture.get(size), str) and url:
                return url
    return None


def _mask(array: pa.Array) -> npt.NDArray[np.bool_]:
    result: npt.NDArray[np.bool_] = pc.fill_null(array, False).to_numpy(zero_copy_only=False)
    return result
