"""Samples of neighbour lists, each decided by a hash (stores -> neighborhoods)."""

import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor

from alignrec.distributed.exchange import ragged_index
from alignrec.graph.hashing import hash_ids, salt, uniform_below
from alignrec.graph.stores import NeighborLists


def sample_lists(
    neighbors: NeighborLists,
    lists: Int64[Tensor, " m"],
    fanout: Int64[Tensor, " m"],
    keys: Int64[Tensor, " m"],
) -> tuple[Int64[Tensor, " m"], Int[Tensor, " total"], Float32[Tensor, " total"]]:
    """Sample from each list without replacement; lists no longer than the fanout come whole.

    Args:
        neighbors: the lists.
        lists: which list to sample, equal ones allowed.
        fanout: edges to sample from each; -1 takes all.
        keys: hash that decides each sample.

    Returns:
        Number of edges from each list; their sources; their weights times n / k, so that a weighted
        sum over the sample is unbiased for the sum over the list.
    """
    # index_select gathers several times faster than indexing with [] on the CPU.
    starts = neighbors.indptr.index_select(0, lists)
    lengths = neighbors.indptr.index_select(0, lists + 1) - starts
    taken = torch.where((fanout >= 0) & (fanout < lengths), fanout, lengths)
    edges = ragged_index(starts, taken)
    scale = torch.ones(len(edges))
    sampled = (taken < lengths).nonzero()[:, 0]
    first = torch.cumsum(taken, 0) - taken
    for k in torch.unique(fanout[sampled]).tolist():
        rows = sampled[fanout[sampled] == k]
        chosen = choose_without_replacement(keys[rows], lengths[rows], k=k)  # (k, rows)
        places = (first[rows] + torch.arange(k)[:, None]).ravel()
        edges.scatter_(0, places, (starts[rows] + chosen).ravel())
        scale.scatter_(0, places, (lengths[rows] / k).to(torch.float32).repeat(k))
    source = neighbors.source.index_select(0, edges)
    return taken, source, neighbors.weight.index_select(0, edges) * scale


def choose_without_replacement(
    keys: Int64[Tensor, " rows"], lengths: Int64[Tensor, " rows"], *, k: int
) -> Int64[Tensor, "k rows"]:
    """Choose k distinct numbers below each length, every subset equally likely.

    Floyd's algorithm (Bentley and Floyd, CACM 1987): the cost depends on k, not on the lengths.

    Args:
        keys: hash that decides each row.
        lengths: larger than k.
        k: how many.
    """
    chosen = torch.empty((k, len(keys)), dtype=torch.int64)
    for step in range(k):
        top = lengths - k + step
        draw = uniform_below(hash_ids(keys, salt(step)), top + 1)
        taken = (chosen[:step] == draw).any(dim=0)
        chosen[step] = torch.where(taken, top, draw)
    return chosen
