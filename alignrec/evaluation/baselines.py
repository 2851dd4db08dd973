"""Score functions that need no stage 2: popularity, zero-shot, item-CF (features -> ranking).

The last two judge the content features before the alignment is trained.
"""

import numpy as np
import scipy.sparse as sp
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.evaluation.ranking import ScoreFunction, stable_topk


def popularity(train: CSR) -> ScoreFunction:
    """Score an item by its number of training interactions, the same for every user."""
    counts = torch.bincount(train.columns, minlength=train.num_cols).float()
    return lambda block: counts.repeat(block.numel(), 1)


def zero_shot(train: CSR, features: Float32[Tensor, "num_items dim"]) -> ScoreFunction:
    """Score by the cosine of an item's features to the mean features of the user's training items.

    Args:
        train: training items of each user.
        features: content features; a zero row scores 0 for everybody.
    """
    interactions = _scipy(train)
    unit = torch.nn.functional.normalize(features, dim=1)

    def scores(block: Int64[Tensor, " block"]) -> Float32[Tensor, "block num_items"]:
        total = torch.from_numpy(interactions[block.numpy()] @ features.numpy())
        # The direction of the sum is the direction of the mean.
        return torch.nn.functional.normalize(total, dim=1) @ unit.T

    return scores


def item_cf(train: CSR, similar: sp.csr_matrix) -> ScoreFunction:
    """Score an item by the summed similarity of those of its neighbours that the user has.

    Args:
        train: training items of each user.
        similar: row i holds the similarity of item i to its nearest neighbours.
    """
    interactions, transposed = _scipy(train), similar.T.tocsr()

    def scores(block: Int64[Tensor, " block"]) -> Float32[Tensor, "block num_items"]:
        return torch.from_numpy((interactions[block.numpy()] @ transposed).toarray())

    return scores


def shrunk_neighbors(
    features: Float32[Tensor, "num_items dim"], *, k: int, shrink: float, block_items: int
) -> sp.csr_matrix:
    """Return the k nearest other items of each item by <a, b> / (|a| |b| + shrink).

    Memory is ``block_items * num_items`` similarities. Neighbours of similarity 0 or below are
    left out, so an item without features has none.
    """
    num_items = features.shape[0]
    norms = features.norm(dim=1)
    rows, cols, values = [], [], []
    for start in range(0, num_items, block_items):
        block = torch.arange(start, min(start + block_items, num_items))
        similarity = features[block] @ features.T
        similarity /= (norms[block].unsqueeze(1) * norms + shrink).clamp(min=1e-12)
        similarity[torch.arange(block.numel()), block] = -torch.inf  # no self-loop
        columns, weights = stable_topk(similarity, min(k, num_items))
        kept = weights > 0
        rows.append(block.unsqueeze(1).expand_as(columns)[kept])
        cols.append(columns[kept])
        values.append(weights[kept])
    coordinates = (torch.cat(rows).numpy(), torch.cat(cols).numpy())
    return sp.csr_matrix((torch.cat(values).numpy(), coordinates), shape=(num_items, num_items))


def _scipy(csr: CSR) -> sp.csr_matrix:
    ones = np.ones(csr.columns.numel(), dtype=np.float32)
    shape = (csr.num_rows, csr.num_cols)
    return sp.csr_matrix((ones, csr.columns.numpy(), csr.row_offsets.numpy()), shape=shape)
