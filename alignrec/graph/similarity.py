"""The symmetrised, normalised item-item matrix, made from neighbour lists with bounded memory.

Lists say what each item chose; a row of the matrix also needs who chose it. So entries go to files
of consecutive rows first, both ways, and each file is then sorted alone.
"""

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from alignrec.data.shared_array import map_array
from alignrec.graph.buckets import append_by_bucket
from alignrec.graph.edges import Similar

_BUCKET_ROWS = 1 << 16
_ENTRY = np.dtype([("row", "<i4"), ("column", "<i4"), ("value", "<f8")])


def write_similarity(
    index: npt.NDArray[np.int32],
    cosine: npt.NDArray[np.float32],
    folder: Path,
    *,
    weight: Literal["cosine", "binary"],
    symmetric: bool,
) -> Similar:
    """Build the normalised item-item matrix S from every item's neighbours.

    S_ij = w_ij / sqrt(d_i d_j) with d_i = sum_j w_ij. Symmetric: i and j are joined when either
    chose the other, and a cosine that is not positive joins nothing. Otherwise the matrix stays
    directed, row i holding what i chose, as in the released code.

    Args:
        index: (num_items, k) item_index of the neighbours, -1 where there is none.
        cosine: (num_items, k) their similarities.
        folder: where the matrix is written as ``indptr.npy``, ``indices.npy`` and ``values.npy``.
        weight: w_ij: the cosine (the larger of both directions), or 1.
        symmetric: see above.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    num_items = len(index)
    for start in range(0, num_items, _BUCKET_ROWS):
        block = slice(start, start + _BUCKET_ROWS)
        _scatter(folder, _entries(start, index[block], cosine[block], weight), symmetric)
    counts = np.zeros(num_items + 1, dtype=np.int64)
    degree = np.zeros(num_items)
    for path, start in _buckets(folder, num_items):
        entries = _distinct(path)
        rows = entries["row"] - start
        size = min(_BUCKET_ROWS, num_items - start)
        counts[start + 1 : start + size + 1] = np.bincount(rows, minlength=size)
        degree[start : start + size] = np.bincount(rows, entries["value"], minlength=size)
        entries.tofile(path)
    indptr = np.cumsum(counts)
    scale = np.zeros(num_items)
    np.power(degree, -0.5, out=scale, where=degree > 0)
    _write_matrix(folder, indptr, scale)
    return open_similarity(folder)


def open_similarity(folder: Path) -> Similar:
    """Map what ``write_similarity`` wrote."""
    return Similar(
        np.load(folder / "indptr.npy"),
        np.load(folder / "indices.npy", mmap_mode="r"),
        np.load(folder / "values.npy", mmap_mode="r"),
    )


def pack_similarity(folder: Path, path: Path) -> None:
    """Put the matrix into one ``.npz`` file, equal bytes for equal matrices."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in ("indptr", "indices", "values"):
            entry = zipfile.ZipInfo(f"{name}.npy")  # its date is fixed
            with (
                (folder / entry.filename).open("rb") as source,
                archive.open(entry, "w", force_zip64=True) as target,
            ):
                shutil.copyfileobj(source, target)


def _entries(
    start: int,
    index: npt.NDArray[np.int32],
    cosine: npt.NDArray[np.float32],
    weight: Literal["cosine", "binary"],
) -> npt.NDArray[np.void]:
    kept = (index >= 0) & (cosine > 0)
    result = np.empty(int(kept.sum()), dtype=_ENTRY)
    result["row"] = start + kept.nonzero()[0]
    result["column"] = index[kept]
    result["value"] = cosine[kept] if weight == "cosine" else 1.0
    return result


def _scatter(folder: Path, entries: npt.NDArray[np.void], symmetric: bool) -> None:
    if symmetric:
        reverse = entries.copy()
        reverse["row"], reverse["column"] = entries["column"], entries["row"]
        entries = np.concatenate([entries, reverse])
    append_by_bucket(
        entries, entries["row"] // _BUCKET_ROWS, lambda number: _bucket_path(folder, number)
    )


def _bucket_path(folder: Path, number: int) -> Path:
    return folder / f"rows_{number:06d}.bin"


def _buckets(folder: Path, num_items: int) -> Iterator[tuple[Path, int]]:
    for start in range(0, num_items, _BUCKET_ROWS):
        path = _bucket_path(folder, start // _BUCKET_ROWS)
        path.touch()
        yield path, start


def _distinct(path: Path) -> npt.NDArray[np.void]:
    """Return the entries by row and column; of equal ones the larger value."""
    entries = np.fromfile(path, dtype=_ENTRY)
    entries = entries[np.lexsort((-entries["value"], entries["column"], entries["row"]))]
    same = (entries["row"][1:] == entries["row"][:-1]) & (
        entries["column"][1:] == entries["column"][:-1]
    )
    distinct: npt.NDArray[np.void] = entries[np.concatenate([[True], ~same])[: len(entries)]]
    return distinct


def _write_matrix(
    folder: Path, indptr: npt.NDArray[np.int64], scale: npt.NDArray[np.float64]
) -> None:
    np.save(folder / "indptr.npy", indptr)
    size = (int(indptr[-1]),)
    indices = map_array(folder / "indices.npy", np.int32, size)
    values = map_array(folder / "values.npy", np.float32, size)
    first = 0
    for path, _ in _buckets(folder, len(scale)):
        entries = np.fromfile(path, dtype=_ENTRY)
        row, column = entries["row"], entries["column"]
        last = first + len(entries)
        indices[first:last] = column
        values[first:last] = scale[row] * entries["value"] * scale[column]
        first = last
        path.unlink()
    indices.flush()
    values.flush()
