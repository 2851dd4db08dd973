"""Nearest items by cosine of their content features, without an N x N matrix (features -> graph).

A block of rows is compared with all items block by block, and only the best k so far are kept:
memory is one block of similarities, whatever the number of items.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from alignrec.errors import UserError

# Cosines nearer than this count as equal and the lower item_index wins, so that the rounding of
# one matrix product or another (block sizes, threads, CPU or GPU) does not decide.
_RESOLUTION = 2.0**-20
_INDEX_BITS = 32
_NOTHING = -(1 << 62)


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """The k most similar items of consecutive items, best first.

    Attributes:
        index: item_index of the neighbours; -1 where there are fewer than k.
        cosine: their similarities; 0 where there is none.
    """

    index: Int64[Tensor, "rows k"]
    cosine: Float32[Tensor, "rows k"]


class FeatureRows:
    """Unit rows of a feature matrix, read and normalised a block at a time."""

    def __init__(self, features: npt.NDArray[np.floating], device: torch.device) -> None:
        self._features = features
        self._device = device
        self.num_items = features.shape[0]

    def read(
        self, start: int, stop: int
    ) -> tuple[Float32[Tensor, "rows dim"], Bool[Tensor, " rows"]]:
        """Return unit rows and which of them are zero, so have no direction.

        Raises:
            UserError: a feature is not finite.
        """
        block = torch.from_numpy(np.array(self._features[start:stop]))
        rows = block.to(self._device, torch.float32)
        # Scaled first: the norm of a row of very large float32 values would be infinite.
        largest = rows.abs().amax(dim=1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            bad = start + int((~torch.isfinite(largest[:, 0])).nonzero()[0])
            raise UserError(
                f"features.npy has a value that is not finite in row {bad}: that item's "
                f"similarities would be NaN. Run the features stage again, or set the row to zero."
            )
        empty = largest[:, 0] == 0
        rows = rows / largest.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.nn.functional.normalize(rows, dim=1), empty


def nearest_items(
    rows: FeatureRows,
    *,
    start: int,
    stop: int,
    k: int,
    block_columns: int,
    include_self: bool,
) -> Neighbors:
    """Find the k items of largest cosine for the items ``start`` .. ``stop - 1``, exactly.

    Items whose features are zero have no neighbours and are nobody's neighbour.

    Args:
        rows: the items' features.
        start: first item of the block.
        stop: one past its last item.
        k: neighbours for each item.
        block_columns: items that the block is compared with at once.
        include_self: whether an item may be its own neighbour (it is then its nearest).
    """
    queries, empty_queries = rows.read(start, stop)
    best = torch.full((stop - start, 0), _NOTHING, dtype=torch.int64, device=queries.device)
    for first, last in _blocks(rows.num_items, block_columns):
        columns, empty = rows.read(first, last)
        keys = _order_keys(queries @ columns.T, first)  # (rows, columns)
        keys[:, empty] = _NOTHING
        if not include_self and start < last and first < stop:
            own = torch.arange(max(start, first), min(stop, last), device=keys.device)
            keys[own - start, own - first] = _NOTHING
        merged = torch.cat([best, keys.topk(min(k, last - first), dim=1).values], dim=1)
        best = merged.topk(min(k, merged.shape[1]), dim=1).values
    best[empty_queries] = _NOTHING
    return _decode(best, k)


def similarity_graph(
    neighbors: Neighbors,
    *,
    weight: Literal["cosine", "binary"],
    symmetric: bool,
) -> sp.csr_matrix:
    """Build the normalised item-item matrix S from every item's neighbours.

    S_ij = w_ij / sqrt(d_i d_j) with d_i = sum_j w_ij. Symmetric: i and j are joined when either
    chose the other, and a cosine that is not positive joins nothing. Otherwise the matrix stays
    directed, row i holding what i chose, as in the released code.

    Returns:
        (num_items, num_items) float32, column indices ascending in a row.
    """
    num_items, k = neighbors.index.shape
    column = neighbors.index.cpu().numpy().ravel()
    value = neighbors.cosine.cpu().numpy().astype(np.float64).ravel()
    row = np.repeat(np.arange(num_items), k)
    kept = (column >= 0) & (value > 0)
    if weight == "binary":
        value = np.ones_like(value)
    matrix = sp.csr_matrix((value[kept], (row[kept], column[kept])), shape=(num_items, num_items))
    if symmetric:
        matrix = matrix.maximum(matrix.T).tocsr()
    degree = np.asarray(matrix.sum(axis=1)).ravel()
    scale = np.zeros(num_items)
    np.power(degree, -0.5, out=scale, where=degree > 0)
    matrix = sp.csr_matrix(sp.diags(scale) @ matrix @ sp.diags(scale))
    matrix.sort_indices()
    return matrix.astype(np.float32)


def _order_keys(similarity: Float[Tensor, "rows columns"], first: int) -> Tensor:
    """Return integers whose order is: larger cosine first, then lower item_index."""
    steps = similarity.div_(_RESOLUTION).round_().to(torch.int64)
    columns = torch.arange(first, first + similarity.shape[1], device=similarity.device)
    return steps.bitwise_left_shift_(_INDEX_BITS).add_((1 << _INDEX_BITS) - 1 - columns)


def _decode(keys: Int64[Tensor, "rows found"], k: int) -> Neighbors:
    absent = keys <= _NOTHING
    index = (1 << _INDEX_BITS) - 1 - (keys & ((1 << _INDEX_BITS) - 1))
    cosine = (keys >> _INDEX_BITS).to(torch.float32) * _RESOLUTION
    missing = k - keys.shape[1]
    pad = (0, missing)
    return Neighbors(
        torch.nn.functional.pad(index.masked_fill(absent, -1), pad, value=-1),
        torch.nn.functional.pad(cosine.masked_fill(absent, 0.0), pad, value=0.0),
    )


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
