"""Feature matrices on disk, made in blocks of rows, never whole in memory (features -> graph)."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignrec.data.shared_array import SharedArray, create_array

Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[Any]

FEATURES = "features.npy"
MASK = "mask.npy"
BLOCK_ROWS = 4096
_NOISE_SHARE = 1e-6  # of the largest variance; rows are single precision


def write(path: Path, shape: tuple[int, int], dtype: str, make: Callable[[slice], Floats]) -> None:
    """Write a matrix block by block.

    Args:
        path: of the new ``.npy`` file.
        shape: rows and columns.
        dtype: number format of the file.
        make: returns the rows of a block.

    Raises:
        OSError: the disk is full.
    """
    create_array(path, dtype, shape)
    with SharedArray.open(path) as file:
        for block in blocks(shape[0]):
            file.write(block.start, make(block))


def blocks(num_rows: int) -> Iterator[slice]:
    """Yield slices that cover all rows."""
    for start in range(0, num_rows, BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, num_rows))


def column_means(matrix: Matrix, present: npt.NDArray[np.bool_]) -> npt.NDArray[np.float64]:
    """Return the column means over the rows that are present, in float64."""
    total = np.zeros(matrix.shape[1], dtype=np.float64)
    for block in blocks(len(matrix)):
        total += matrix[block][present[block]].astype(np.float64).sum(axis=0)
    return total / max(1, int(present.sum()))


def whitening(
    matrix: Matrix,
    present: npt.NDArray[np.bool_],
    means: npt.NDArray[np.float64],
    *,
    strength: float,
) -> npt.NDArray[np.float64]:
    """Return the (dim, dim) matrix that evens out the variances of centred rows.

    With the covariance V diag(s^2) V^T it is V diag(s^-strength) V^T (ZCA; Su et al. 2021 use 1 on
    sentence vectors). Directions of next to no variance are dropped: they are rounding noise.

    Args:
        matrix: (rows, dim).
        present: rows that count.
        means: column means of those rows.
        strength: 0 changes nothing, 1 gives every direction the same variance.
    """
    dim = matrix.shape[1]
    total = np.zeros((dim, dim))
    for block in blocks(len(matrix)):
        rows = matrix[block][present[block]].astype(np.float64) - means
        total += rows.T @ rows
    variances, directions = np.linalg.eigh(total / max(1, int(present.sum())))
    kept = variances > _NOISE_SHARE * max(float(variances[-1]), 1e-30)
    deviations = np.sqrt(np.where(kept, variances, 1.0))
    factors = np.where(kept, deviations**-strength, 0.0)
    turn: npt.NDArray[np.float64] = (directions * factors) @ directions.T
    return turn


def unit_rows(rows: Floats) -> Floats:
    """Scale rows to length 1; zero rows stay zero."""
    lengths = np.linalg.norm(rows.astype(np.float64), axis=1, keepdims=True)
    return (rows / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
