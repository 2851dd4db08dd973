"""Arrays in files of which several ranks write disjoint rows (ranks on any hosts -> one file).

Rows are written by their offset. Through a mapping a host writes back whole pages, so on a network
file system two hosts whose rows share a page would lose one another's, without an error.
"""

import os
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

Mapped = np.memmap[Any, np.dtype[Any]]


def create_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> None:
    """Write an ``.npy`` file of zeros without touching its pages; on one rank."""
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.truncate(file.tell() + int(np.prod(shape)) * np.dtype(dtype).itemsize)
        os.fsync(file.fileno())


def map_array(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> Mapped:
    """Write an ``.npy`` file of zeros and map it for writing in any order; for one process alone.

    Its place on the disk is taken at once: a disk that gets full under a mapping kills the process
    without a word.

    Raises:
        OSError: the disk has no room for it.
    """
    create_array(path, dtype, shape)
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    array: Mapped = np.load(path, mmap_mode="r+")
    return array


class SharedArray:
    """An array in a file, open for writing; what was written is on disk when the block ends."""

    def __init__(self, path: Path, *, start: int, dtype: npt.DTypeLike, row: int) -> None:
        """Open a file.

        Args:
            path: of a file that is there.
            start: bytes before the first row.
            dtype: of the numbers.
            row: numbers in a row.
        """
        self._start, self._dtype, self._row = start, np.dtype(dtype), row
        self._file: BinaryIO = path.open("r+b")

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open what ``create_array`` made."""
        with path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            start = file.tell()
        return cls(path, start=start, dtype=dtype, row=int(np.prod(shape[1:])))

    def write(self, first: int, rows: npt.NDArray[Any]) -> None:
        """Write consecutive rows from row ``first`` on."""
        self._file.seek(self._start + first * self._row * self._dtype.itemsize)
        self._file.write(np.ascontiguousarray(rows, dtype=self._dtype).data)

    def flush(self) -> None:
        """Hand what was written to the host: the death of this process loses nothing of it."""
        self._file.flush()

    def sync(self) -> None:
        """Wait until what was written is on disk: the death of this host loses nothing of it."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._file:
            self.sync()
