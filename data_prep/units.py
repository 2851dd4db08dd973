"""Units of work whose result is there completely or not at all (every step of the log).

A unit is a folder that appears by rename. So a unit that is there is finished, whoever made it, and
one that was killed left nothing but a folder of another name.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa


@contextlib.contextmanager
def writing(unit: Path) -> Iterator[Path]:
    """Give a folder to write into; it becomes ``unit`` when the block ends without an exception."""
    draft = unit.with_name(f".{unit.name}.{uuid.uuid4().hex}")
    draft.mkdir(parents=True)
    try:
        yield draft
        try:
            draft.rename(unit)
        except OSError:
            # An attempt that was given up for dead was faster: its files are the same.
            if not unit.is_dir():
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def save(path: Path, **arrays: npt.NDArray[Any]) -> None:
    """Write each array to ``<path>/<name>.npy``."""
    for name, array in arrays.items():
        np.save(path / f"{name}.npy", array)


def load(path: Path, name: str) -> npt.NDArray[Any]:
    """Map an array that ``save`` wrote into memory."""
    array: npt.NDArray[Any] = np.load(path / f"{name}.npy", mmap_mode="r")
    return array


def save_strings(path: Path, keys: pa.Array) -> None:
    """Write strings so that they can be mapped into memory; a reader sees all of them or none."""
    table = pa.table({"key": keys})
    spare = path.with_name(f".{path.name}.{os.getpid()}")
    with pa.OSFile(str(spare), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    spare.replace(path)


def as_strings(keys: pa.Array) -> pa.Array:
    """Return part of a large string array, at most 2 GiB, as strings.

    A slice keeps its offsets, which may be too large for strings: so it is copied first.
    """
    return keys.take(pa.array(np.arange(len(keys)))).cast(pa.string())


def load_strings(path: Path) -> pa.Array:
    """Map strings that ``save_strings`` wrote into memory."""
    with pa.memory_map(str(path)) as file:
        column = pa.ipc.open_file(file).read_all()["key"]
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
