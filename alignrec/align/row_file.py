"""Tables in one safetensors file that several ranks fill, row by row (ranks -> artifact).

The ranks must see the same file system, as they do for every artifact. No rank has a whole table
in memory.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

_BYTES = 4  # float32

Rows = np.memmap[Any, np.dtype[np.float32]]


def create(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of float32 zeros without touching its pages."""
    header, start = {}, 0
    for name, shape in shapes.items():
        stop = start + int(np.prod(shape)) * _BYTES
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data must be aligned
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + start)


def write_rows(path: Path, name: str, index: Tensor, rows: Tensor) -> None:
    """Write rows of one table; other ranks write other rows at the same time."""
    table = _open(path, name, "r+")
    table[index.cpu().numpy()] = rows.detach().cpu().numpy()
    table.flush()


def read(path: Path, name: str) -> Tensor:
    """Return one table, mapped from the file: only pages that are read are in memory."""
    return torch.from_numpy(_open(path, name, "c"))


def _open(path: Path, name: str, mode: Literal["r+", "c"]) -> Rows:
    with path.open("rb") as file:
        length = struct.unpack("<Q", file.read(8))[0]
        entry = json.loads(file.read(length))[name]
    offset = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, np.float32, mode, offset, tuple(entry["shape"]))
