"""Nearest items by cosine of their content features, without an N x N matrix (features -> graph).

A block of rows is compared with all items block by block, and only the best k so far are kept:
memory is one block of similarities, whatever the number of items.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from alignrec.errors import UserError
from alignrec.graph.hashing import hash_ids, salt

# Cosines nearer than this count as equal and a hash of both items decides, so that the rounding of
# one matrix product or another (block sizes, threads, CPU or GPU) does not.
RESOLUTION = 2.0**-20
_INDEX_BITS = 32
_INDEX_MASK = (1 << _INDEX_BITS) - 1
_STREAM = 0x544945
# An odd factor permutes 32-bit numbers, consecutive ones evenly (2**32 over the golden ratio).
_FACTOR = 0x9E3779B1
_INVERSE = pow(_FACTOR, -1, 1 << _INDEX_BITS)
NOTHING = -(1 << 62)


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
        self.device = device
        self.num_items, self.dim = features.shape

    def read(
        self, start: int, stop: int
    ) -> tuple[Float32[Tensor, "rows dim"], Bool[Tensor, " rows"]]:
        """Return unit rows and which of them are zero, so have no direction.

        Raises:
            UserError: a feature is not finite.
        """
        return self._unit(np.array(self._features[start:stop]), range(start, stop))

    def take(
        self, items: Int64[Tensor, " rows"]
    ) -> tuple[Float32[Tensor, "rows dim"], Bool[Tensor, " rows"]]:
        """Return the unit rows of some items, and which of them are zero.

        Raises:
            UserError: a feature is not finite.
        """
        ids = items.cpu().numpy()
        return self._unit(self._features[ids], ids)

    def _unit(
        self, block: npt.NDArray[np.floating], items: Sequence[int] | npt.NDArray[np.int64]
    ) -> tuple[Tensor, Tensor]:
        rows = torch.from_numpy(block).to(self.device, torch.float32)
        # Scaled first: the norm of a row of very large float32 values would be infinite.
        largest = rows.abs().amax(dim=1, keepdim=True)
        if not bool(torch.isfinite(largest).all()):
            bad = items[int((~torch.isfinite(largest[:, 0])).nonzero()[0])]
            raise UserError(
                f"features.npy has a value that is not finite in row {bad}: that item's "
                f"similarities would be NaN. Run the features stage again, or set the row to zero."
            )
        empty = largest[:, 0] == 0
        rows = rows / largest.clamp_min(torch.finfo(torch.float32).tiny)
        return torch.nn.functional.normalize(rows, dim=1), empty


def nearest_keys(
    rows: FeatureRows,
    queries: Int64[Tensor, " rows"],
    *,
    k: int,
    block_columns: int,
    include_self: bool,
    among: Int64[Tensor, " items"] | None = None,
) -> Int64[Tensor, "rows found"]:
    """Find the items of largest cosine for some items, exactly, as order keys (see ``decode``).

    Items whose features are zero have no neighbours and are nobody's neighbour.

    Args:
        rows: the items' features.
        queries: item_index of the items that neighbours are found of.
        k: neighbours for each item; there are fewer columns where there are fewer items.
        block_columns: items that the queries are compared with at once.
        include_self: whether an item may be its own neighbour (it is then its nearest).
        among: item_index, ascending, of the items that are compared; None compares all.
    """
    queries = queries.to(rows.device)
    vectors, empty_queries = rows.take(queries)
    best = torch.full((len(queries), 0), NOTHING, dtype=torch.int64, device=rows.device)
    total = rows.num_items if among is None else len(among)
    for first, last in _blocks(total, block_columns):
        if among is None:
            ids = torch.arange(first, last, device=rows.device)
            columns, empty = rows.read(first, last)
        else:
            ids = among[first:last].to(rows.device)
            columns, empty = rows.take(ids)
        keys = order_keys(vectors @ columns.T, queries, ids)  # (rows, columns)
        keys[:, empty] = NOTHING
        if not include_self:
            place = torch.searchsorted(ids, queries).clamp_max(len(ids) - 1)
            own = (ids[place] == queries).nonzero()[:, 0]
            keys[own, place[own]] = NOTHING
        merged = torch.cat([best, keys.topk(min(k, last - first), dim=1).values], dim=1)
        best = merged.topk(min(k, merged.shape[1]), dim=1).values
    best[empty_queries] = NOTHING
    return best


def nearest_items(
    rows: FeatureRows,
    queries: Int64[Tensor, " rows"],
    *,
    k: int,
    block_columns: int,
    include_self: bool,
) -> Neighbors:
    """Find the k items of largest cosine among all, exactly (see ``nearest_keys``)."""
    keys = nearest_keys(rows, queries, k=k, block_columns=block_columns, include_self=include_self)
    return decode(keys, queries.to(rows.device), k)


def order_keys(
    similarity: Float[Tensor, "rows columns"],
    queries: Int64[Tensor, " rows"],
    items: Int64[Tensor, " columns"],
) -> Int64[Tensor, "rows columns"]:
    """Return integers whose order is: larger cosine first, then as both items' numbers mix.

    Items that are equal (the same product twice, items without text that share a picture) are thus
    chosen by different ones of those to whom they are equally near. By item_index the first few of
    them would be everyone's neighbours.

    Args:
        similarity: cosines; overwritten.
        queries: item_index of each row.
        items: item_index of each column.
    """
    steps = similarity.div_(RESOLUTION).round_().to(torch.int64)
    keys = steps.bitwise_left_shift_(_INDEX_BITS).bitwise_or_(items * _FACTOR & _INDEX_MASK)
    return keys.bitwise_xor_(_masks(queries))


def encode(neighbors: Neighbors, queries: Int64[Tensor, " rows"]) -> Int64[Tensor, "rows k"]:
    """Return the order keys of the queries' neighbours: what ``decode`` was given."""
    steps = (neighbors.cosine.to(torch.float64) / RESOLUTION).round().to(torch.int64)
    mixed = (neighbors.index * _FACTOR & _INDEX_MASK) ^ _masks(queries)
    return ((steps << _INDEX_BITS) | mixed).masked_fill(neighbors.index < 0, NOTHING)


def decode(keys: Int64[Tensor, "rows found"], queries: Int64[Tensor, " rows"], k: int) -> Neighbors:
    """Return the items and cosines of the queries' order keys; -1 and 0 where there is nothing."""
    absent = keys <= NOTHING
    index = ((keys ^ _masks(queries)) & _INDEX_MASK) * _INVERSE & _INDEX_MASK
    cosine = (keys >> _INDEX_BITS).to(torch.float32) * RESOLUTION
    pad = (0, k - keys.shape[1])
    return Neighbors(
        torch.nn.functional.pad(index.masked_fill(absent, -1), pad, value=-1),
        torch.nn.functional.pad(cosine.masked_fill(absent, 0.0), pad, value=0.0),
    )


def _masks(queries: Int64[Tensor, " rows"]) -> Int64[Tensor, "rows 1"]:
    """Return random bits of each query, which put equally near items in an order of its own."""
    return (hash_ids(queries, salt(_STREAM)) & _INDEX_MASK)[:, None]


def _blocks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(0, total, size):
        yield start, min(start + size, total)
