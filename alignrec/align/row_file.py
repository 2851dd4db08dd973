"""Tables in one safetensors file that several ranks fill (ranks -> artifact).

The ranks must see the same file system, as they do for every artifact. No rank has a whole table
in memory. Which rows a rank has is up to the partitions; what it writes is a range, in one piece.
"""

import json
import struct
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from alignrec.data.shared_array import SharedArray
from alignrec.distributed.exchange import Exchange

_TYPES: Mapping[str, np.dtype[Any]] = {"F32": np.dtype(np.float32), "U8": np.dtype(np.uint8)}
# What a rank receives at once, to write it.
_RANGE_BYTES = 1 << 25

Rows = np.memmap[Any, np.dtype[Any]]


def create(
    path: Path, shapes: Mapping[str, tuple[int, ...]], *, masks: Collection[str] = ()
) -> None:
    """Write a safetensors file of zeros without touching its pages.

    Args:
        path: of the new file.
        shapes: of each table, those of ``masks`` last, so that the others are aligned.
        masks: names of tables of uint8; the others are float32.
    """
    header, start = {}, 0
    for name, shape in shapes.items():
        kind = "U8" if name in masks else "F32"
        stop = start + int(np.prod(shape)) * _TYPES[kind].itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data must be aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)


def write_rows(
    path: Path,
    name: str,
    index: Int64[Tensor, " n"],
    rows: Shaped[Tensor, "n d"],
    *,
    exchange: Exchange,
) -> None:
    """Write a table of which every rank has some rows; collective.

    Args:
        path: what ``create`` made.
        name: of the table.
        index: numbers of the rows that this rank has; every row is some rank's, and one's alone.
        rows: this rank's rows, of the table's type.
        exchange: between the ranks.
    """
    start, shape, dtype = _find(path, name)
    order = index.argsort()
    ascending = index[order]
    share = max(_RANGE_BYTES // max(shape[1] * dtype.itemsize, 1), 1)
    with SharedArray(path, start=start, dtype=dtype, row=shape[1]) as file:
        for first in range(0, shape[0], share * exchange.world_size):
            ends = torch.tensor([first, first + share * exchange.world_size])
            lower, upper = torch.searchsorted(ascending, ends).tolist()
            numbers = ascending[lower:upper]
            route = exchange.send(numbers, (numbers - first) // share)
            mine = rows.detach()[order[lower:upper]].cpu()
            arrived = route.send_back(mine)
            block = torch.empty_like(arrived)
            own = first + exchange.rank_index * share
            block[route.received - own] = arrived
            file.write(own, block.numpy())


def write_whole(path: Path, name: str, table: Tensor) -> None:
    """Write a table that this rank has as a whole; on one rank."""
    start, _, dtype = _find(path, name)
    with SharedArray(path, start=start, dtype=dtype, row=1) as file:
        file.write(0, table.detach().cpu().numpy())


def read(path: Path, name: str) -> Tensor:
    """Return one table, mapped from the file: only pages that are read are in memory."""
    start, shape, dtype = _find(path, name)
    table: Rows = np.memmap(path, dtype, "c", start, shape)
    return torch.from_numpy(table)


def _find(path: Path, name: str) -> tuple[int, tuple[int, ...], np.dtype[Any]]:
    """Return where a table begins in the file, its shape and its type."""
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(length))[name]
    return 8 + length + entry["data_offsets"][0], tuple(entry["shape"]), _TYPES[entry["dtype"]]
