"""Features that somebody else computed: unit rows of files side by side (files -> features)."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.format import open_memmap

from alignrec.errors import UserError
from alignrec.features import rows
from alignrec.features.config import FeatureFile


def write_imported(
    files: tuple[FeatureFile, ...], folder: Path, *, num_items: int, dtype: str
) -> int:
    """Write ``features.npy`` and ``mask.npy`` and return the number of columns.

    A row of zeros in a file means that the item lacks that modality.

    Raises:
        UserError: a file is absent, of another shape, or holds NaN or infinity.
    """
    given = [_Given.open(file, num_items) for file in files]
    mask = np.zeros((num_items, 2), dtype=bool)
    for one in given:
        mask[:, 0 if one.file.modality == "image" else 1] |= one.present
    dim: int = sum(one.matrix.shape[1] for one in given)
    rows.write(
        folder / rows.FEATURES,
        (num_items, dim),
        dtype,
        lambda block: np.concatenate([one.unit_rows(block) for one in given], axis=1),
    )
    np.save(folder / rows.MASK, mask)
    return dim


@dataclasses.dataclass(frozen=True)
class _Given:
    """One file, open: which of its rows are there, and what is subtracted from them."""

    file: FeatureFile
    matrix: rows.Matrix
    present: npt.NDArray[np.bool_]
    means: npt.NDArray[np.float64] | float

    @classmethod
    def open(cls, file: FeatureFile, num_items: int) -> "_Given":
        matrix = _open(file.path, num_items)
        present = _present(matrix, file.path)
        means = rows.column_means(matrix, present) if file.center else 0.0
        return cls(file, matrix, present, means)

    def unit_rows(self, block: slice) -> rows.Floats:
        """Return a block of rows at length 1."""
        centred = (self.matrix[block] - self.means).astype(np.float32)
        return rows.unit_rows(centred * self.present[block, None])


def _open(path: Path, num_items: int) -> rows.Matrix:
    try:
        matrix: rows.Matrix = open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"features.files: cannot read {path} ({error}). Give the path of a .npy file."
        ) from error
    if matrix.ndim != 2 or matrix.dtype.kind != "f":
        raise UserError(
            f"features.files: {path} holds {matrix.dtype} of shape {matrix.shape}, but one row of "
            f"floating-point numbers per item is needed. Save a float matrix (items, columns)."
        )
    if len(matrix) != num_items:
        raise UserError(
            f"features.files: {path} has {len(matrix)} rows but the dataset has {num_items} items, "
            f"so rows would belong to the wrong items. Give the file made for this catalogue."
        )
    return matrix


def _present(matrix: rows.Matrix, path: Path) -> npt.NDArray[np.bool_]:
    present = np.zeros(len(matrix), dtype=bool)
    for block in rows.blocks(len(matrix)):
        part = np.asarray(matrix[block], dtype=np.float32)
        if not np.isfinite(part).all():
            row = block.start + int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
            raise UserError(
                f"features.files: {path} holds NaN or infinity in row {row}, which would spread "
                f"over the item graph. Replace such rows, by zeros for an item without content."
            )
        present[block] = (part != 0).any(axis=1)
    return present
