"""Approximate nearest items: a catalogue cut into cells, of which each item looks into a few.

An inverted file (Sivic and Zisserman, ICCV 2003): spherical k-means on a sample gives one centroid
a cell, every item lies in the cell of its nearest centroid, and an item is compared exactly with
the items of the ``probes`` cells whose centroids are nearest to it. Work is about
items * (cells + probes * items / cells) products instead of items squared.

How many cells must be looked into for a wanted recall is not guessed: for a sample of items the
exact neighbours are found, and where these lie says what any number of probes would find.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from alignrec.graph.knn import NOTHING, RESOLUTION, FeatureRows, Neighbors, decode, order_keys

_SAMPLES_PER_CELL = 40
_MAX_SAMPLES = 1 << 18
_ITERATIONS = 8
_MAX_CELLS = 1 << 16
# Numbers of one block: similarities to centroids, similarities to items, candidates.
_BLOCK_NUMBERS = 1 << 23
_COLUMNS = 4096
_CANDIDATES = 1 << 22


Places = slice | npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True)
class CellIndex:
    """The items in the order of their cells; items without features are in none.

    Attributes:
        centroids: unit rows, (num_cells, dim).
        starts: the items of cell c lie at ``starts[c]`` .. ``starts[c + 1]``.
        items: item_index by position, ascending in a cell.
        vectors: reads the unit features at some positions, on the device of the centroids.
    """

    centroids: Float32[Tensor, "num_cells dim"]
    starts: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    vectors: Callable[[Places], Float32[Tensor, "places dim"]]


def num_cells(num_items: int) -> int:
    """Return how many cells balance the work on centroids and on items."""
    return int(np.clip(round(2 * num_items**0.5), 1, _MAX_CELLS))


def sample_items(num_items: int, count: int, seed: tuple[int, ...]) -> Int64[Tensor, " n"]:
    """Return ``count`` distinct items (all, if there are fewer), ascending."""
    rng = np.random.default_rng(seed)
    chosen = rng.choice(num_items, size=min(count, num_items), replace=False, shuffle=False)
    return torch.from_numpy(np.sort(chosen))


def train_centroids(
    rows: FeatureRows, *, cells: int, seed: int
) -> Float32[Tensor, "num_cells dim"]:
    """Find the cells' centroids by spherical k-means on a sample of the items.

    A centroid that is nearest to nothing stays where it is: its cell is empty.
    """
    count = min(_SAMPLES_PER_CELL * cells, _MAX_SAMPLES)
    vectors, empty = rows.take(sample_items(rows.num_items, count, (seed, 0)))
    vectors = vectors[~empty]
    if not len(vectors):
        return torch.zeros(1, rows.dim, device=rows.device)
    order = np.random.default_rng((seed, 1)).permutation(len(vectors))[:cells]
    centroids = vectors[torch.from_numpy(order).to(rows.device)].clone()
    on_host = vectors.cpu()
    for _ in range(_ITERATIONS):
        cell = nearest_cells(vectors, centroids, 1)[:, 0].cpu()
        # On the CPU the order of summation is fixed; on a GPU it would not be.
        sums = torch.zeros(centroids.shape).index_add_(0, cell, on_host)
        norms = sums.norm(dim=1, keepdim=True)
        centroids = torch.where(
            (norms > 0).to(rows.device), (sums / norms).to(rows.device), centroids
        )
    return centroids


def nearest_cells(
    vectors: Float32[Tensor, "rows dim"], centroids: Float32[Tensor, "num_cells dim"], count: int
) -> Int64[Tensor, "rows count"]:
    """Return the cells whose centroids have the largest cosine with each row, nearest first."""
    step = max(_BLOCK_NUMBERS // max(len(centroids), 1), 1)
    parts = [
        (block @ centroids.T).topk(count, dim=1).indices for block in torch.split(vectors, step)
    ]
    return torch.cat([torch.empty(0, count, dtype=torch.int64, device=vectors.device), *parts])


def assign_cells(
    rows: FeatureRows, centroids: Float32[Tensor, "num_cells dim"], items: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Return the cell of each item; -1 for items without features."""
    vectors, empty = rows.take(torch.from_numpy(items))
    cell = nearest_cells(vectors, centroids, 1)[:, 0].masked_fill(empty, -1)
    return cell.cpu().numpy().astype(np.int32)


def cell_order(
    cell: npt.NDArray[np.int32], cells: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return ``items`` and ``starts`` of the index for the cell of every item."""
    items = np.argsort(cell, kind="stable")
    counts = np.bincount(cell + 1, minlength=cells + 1)
    return items[counts[0] :], np.concatenate([[0], np.cumsum(counts[1:])])


def search_cells(
    index: CellIndex,
    queries: npt.NDArray[np.int64],
    *,
    k: int,
    probes: int,
    include_self: bool,
) -> Neighbors:
    """Find the k items of largest cosine in the ``probes`` cells nearest to each query.

    Args:
        index: all items.
        queries: positions in the index; neighbouring ones share cells, which is faster.
        k: neighbours for each.
        probes: cells that each looks into.
        include_self: whether an item may be its own neighbour.
    """
    step = max(_CANDIDATES // (probes * k), 1)
    parts = [
        _search_block(index, queries[first : first + step], k, probes, include_self)
        for first in range(0, len(queries), step)
    ]
    keys = torch.cat([torch.empty((0, k), dtype=torch.int64), *parts])
    return decode(keys, torch.from_numpy(index.items[queries]), k)


def recall_by_probes(
    index: CellIndex,
    cell: npt.NDArray[np.int32],
    vectors: Float32[Tensor, "sample dim"],
    exact: Neighbors,
) -> Float32[Tensor, "sample num_cells"]:
    """Return which share of its exact neighbours each sampled item finds with 1, 2, ... probes.

    Args:
        index: all items.
        cell: cell of every item.
        vectors: unit features of the sampled items.
        exact: their exact neighbours; every item has one at least.
    """
    cells = len(index.centroids)
    own = torch.from_numpy(cell[exact.index.clamp_min(0).cpu().numpy()].astype(np.int64))
    curves = torch.zeros(len(vectors), cells)
    for row, vector in enumerate(vectors):
        rank = torch.empty(cells, dtype=torch.int64)
        rank[(index.centroids @ vector).argsort(descending=True).cpu()] = torch.arange(cells)
        valid = exact.index[row] >= 0
        found = torch.bincount(rank[own[row]][valid], minlength=cells).cumsum(0)
        curves[row] = found / int(valid.sum())
    return curves


def fewest_probes(curves: Float32[Tensor, "sample num_cells"], recall: float) -> tuple[int, float]:
    """Return the smallest number of probes whose recall is surely enough, and that recall.

    Surely: by two standard errors, so that another sample would say the same.
    """
    if len(curves) == 0:
        return 1, 1.0
    mean = curves.mean(dim=0)
    error = curves.std(dim=0, correction=0) / len(curves) ** 0.5
    too_few = int((mean - 2 * error < recall).sum())
    probes = min(too_few + 1, curves.shape[1])
    return probes, float(mean[probes - 1])


def measured_recall(found: Neighbors, exact: Neighbors) -> tuple[float, float]:
    """Return the share of exact neighbours that were found, and its standard error.

    An equally near item counts as well.
    """
    valid = exact.index >= 0
    worst = torch.where(valid, exact.cosine, torch.inf).amin(dim=1, keepdim=True)
    # Another matrix product may round a cosine to the next step.
    hits = ((found.index >= 0) & (found.cosine >= worst - 1.5 * RESOLUTION)).sum(dim=1)
    wanted = valid.sum(dim=1)
    shares = (torch.minimum(hits, wanted) / wanted)[wanted > 0]
    if len(shares) == 0:
        return 1.0, 0.0
    return float(shares.mean()), float(shares.std(correction=0) / len(shares) ** 0.5)


def _search_block(
    index: CellIndex, queries: npt.NDArray[np.int64], k: int, probes: int, include_self: bool
) -> Int64[Tensor, "rows k"]:
    """Return order keys of the best k: each cell is compared with all queries that look into it."""
    device = index.centroids.device
    vectors = index.vectors(queries)
    cells = nearest_cells(vectors, index.centroids, probes).ravel()
    slots = cells.argsort(stable=True)  # slot = query * probes + place of the cell
    counts = torch.bincount(cells, minlength=len(index.centroids)).tolist()
    keys = torch.full((len(slots), k), NOTHING, dtype=torch.int64, device=device)
    place = torch.from_numpy(queries).to(device)
    asking = torch.from_numpy(index.items[queries]).to(device)
    first = 0
    for cell, count in enumerate(counts):
        start, stop = int(index.starts[cell]), int(index.starts[cell + 1])
        if count and start < stop:
            for mine in torch.split(slots[first : first + count], _BLOCK_NUMBERS // _COLUMNS):
                query = mine // probes
                own = None if include_self else place[query]
                keys[mine] = _search_cell(index, vectors[query], asking[query], own, start, stop, k)
        first += count
    best: Tensor = keys.view(len(queries), -1).topk(k, dim=1).values
    return best.cpu()


def _search_cell(
    index: CellIndex,
    vectors: Tensor,
    asking: Tensor,
    own: Tensor | None,
    start: int,
    stop: int,
    k: int,
) -> Tensor:
    """Return order keys of the best k among the positions ``start`` .. ``stop - 1``."""
    best = torch.empty((len(vectors), 0), dtype=torch.int64, device=vectors.device)
    for first in range(start, stop, _COLUMNS):
        last = min(first + _COLUMNS, stop)
        columns = index.vectors(slice(first, last))
        items = torch.from_numpy(index.items[first:last]).to(vectors.device)
        keys = order_keys(vectors @ columns.T, asking, items)
        if own is not None:
            inside = ((own >= first) & (own < last)).nonzero()[:, 0]
            keys[inside, own[inside] - first] = NOTHING
        top = keys.topk(min(k, last - first), dim=1).values
        if first > start:
            both = torch.cat([best, top], dim=1)
            top = both.topk(min(k, both.shape[1]), dim=1).values
        best = top
    return torch.nn.functional.pad(best, (0, k - best.shape[1]), value=NOTHING)
