"""Neighbours from an earlier graph: what can be kept when the catalogue has grown (graph -> kNN).

An item's k best of yesterday are still right where their features and its own are unchanged; only
new or changed items can come closer. So unchanged items are compared with the new and changed
ones, and searched in full only where a neighbour was lost that nothing as near replaces.
"""

import dataclasses
import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from torch import Tensor

from alignrec import artifacts
from alignrec.errors import UserError
from alignrec.graph import schema
from alignrec.graph.hashing import hash_ids, salt
from alignrec.graph.knn import NOTHING, FeatureRows, Neighbors, encode, nearest_keys

_STREAM = 0x444947
_DIGEST_WORDS = 2
_BLOCK_ROWS = 8192

Digests = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class PreviousCells:
    """The cells of an earlier approximate search.

    Attributes:
        centroids: unit rows, (num_cells, dim) float32.
        cell: cell of each item, int32, -1 for those without features; memory-mapped.
        num_added: items that came into the cells, or changed there, since these were cut.
    """

    centroids: npt.NDArray[np.float32]
    cell: npt.NDArray[np.int32]
    num_added: int


@dataclasses.dataclass(frozen=True)
class Previous:
    """Neighbour lists of an earlier graph and the features that they were found with.

    Attributes:
        index: (rows, k) int32 item_index, -1 where there is none; memory-mapped.
        cosine: (rows, k) float32; memory-mapped.
        changed: item_index, ascending, of new items and those whose features differ.
        cells: None after an exact search.
    """

    index: npt.NDArray[np.int32]
    cosine: npt.NDArray[np.float32]
    changed: npt.NDArray[np.int64]
    cells: PreviousCells | None

    def keys(self, items: Int64[Tensor, " rows"]) -> Int64[Tensor, "rows k"]:
        """Return the order keys of the lists of unchanged items."""
        rows = items.cpu().numpy()
        index = torch.from_numpy(self.index[rows].astype(np.int64))
        return encode(Neighbors(index, torch.from_numpy(self.cosine[rows])), items.cpu())


def row_digests(features: npt.NDArray[np.floating]) -> Digests:
    """Return 128 bits for each row of features: equal rows, equal digests.

    Rows that differ have equal digests with a chance of about 2**-64: each half is a sum of the
    row's words of at most 32 bits times fixed random odd numbers, modulo 2**64.
    """
    word_bytes = min(features.dtype.itemsize, 4)
    words = features.shape[1] * features.dtype.itemsize // word_bytes
    numbers = hash_ids(torch.arange(words * _DIGEST_WORDS), salt(_STREAM)).numpy()
    factors = (numbers.view(np.uint64) | np.uint64(1)).reshape(words, _DIGEST_WORDS)
    result = np.empty((len(features), _DIGEST_WORDS), dtype=np.uint64)
    for start in range(0, len(features), _BLOCK_ROWS):
        block = np.ascontiguousarray(features[start : start + _BLOCK_ROWS]).view(f"u{word_bytes}")
        result[start : start + len(block)] = block.astype(np.uint64) @ factors
    return result


def open_previous(folder: Path, digests: Digests, settings: dict[str, object]) -> Previous | str:
    """Open an earlier graph's neighbour lists, or say why they cannot be used: it "was ...".

    Args:
        folder: a finished graph artifact.
        digests: of the present features.
        settings: what the lists depend on (``Search.settings``); other settings, other lists.

    Raises:
        UserError: the folder is no finished graph, or it is damaged.
    """
    facts = artifacts.read(folder, "graph").facts
    if facts.get("search") != settings:
        return "was searched with other settings"
    path = functools.partial(schema.neighbors_path, folder)
    cells = None
    try:
        index = np.load(path("index"), mmap_mode="r")
        cosine = np.load(path("cosine"), mmap_mode="r")
        before = np.load(path("digest"))
        if settings["method"] == "ann":
            centroids, cell = np.load(path("centroids")), np.load(path("cell"), mmap_mode="r")
            cells = PreviousCells(centroids, cell, facts["num_added"])
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{folder} has no readable neighbour lists ({error}), so nothing can be kept from it. "
            f"Run its graph stage again or leave graph.knn.previous out."
        ) from error
    if len(before) > len(digests):
        # An item_index is never taken away.
        return f"was made of another catalogue, of {len(before):,} items"
    same = (before == digests[: len(before)]).all(axis=1)
    fresh = np.arange(len(before), len(digests))
    return Previous(index, cosine, np.concatenate([np.flatnonzero(~same), fresh]), cells)


def updated_keys(
    rows: FeatureRows,
    previous: Previous,
    items: Int64[Tensor, " rows"],
    *,
    k: int,
    block_columns: int,
) -> tuple[Int64[Tensor, "rows k"], Int64[Tensor, " incomplete"]]:
    """Bring the lists of unchanged items up to date.

    Args:
        rows: the present features.
        previous: the earlier lists.
        items: item_index of unchanged items.
        k: neighbours for each.
        block_columns: items compared at once.

    Returns:
        Order keys of the lists, and the items whose list may lack an item: one that was lost left
        a gap that nothing at least as near as the old list's end fills.
    """
    changed = torch.from_numpy(previous.changed)
    old = previous.keys(items).to(rows.device)
    index = torch.from_numpy(previous.index[items.cpu().numpy()].astype(np.int64))
    lost = torch.isin(index, changed).to(rows.device)
    near = nearest_keys(
        rows, items, k=k, block_columns=block_columns, include_self=True, among=changed
    )
    kept = torch.cat([old.masked_fill(lost, NOTHING), near], dim=1).topk(k, dim=1).values
    # Whatever is not in the old list is farther than its end.
    incomplete = lost.any(dim=1) & (kept[:, -1] < old[:, -1])
    return kept, items[incomplete.cpu()]
