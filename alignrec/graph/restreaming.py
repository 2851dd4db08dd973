"""Partitions by passes over the edges, in memory for nodes alone (edge streams -> partitions).

In the family of LDG (Stanton and Kliot, KDD 2012) and its restreaming (Nishimura and Ugander, KDD
2013), for two kinds of nodes in turn: a user goes where most of its items are, an item where most
of its users (and similar items) are, as long as there is room. Two levels, because neighbours that
are scattered at first agree on many small clusters sooner than on few large parts: the passes first
find clusters, METIS puts these together (a graph of some hundred nodes), and further passes refine
the parts.
"""

import dataclasses
import itertools
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch

from alignrec.graph.buckets import append_by_bucket
from alignrec.graph.edges import GraphStreams
from alignrec.graph.hashing import hash_ids, salt, uniform_below
from alignrec.graph.schema import ITEM, NODE_TYPES, RATES, USER, NodeType

_CLUSTER_PASSES = 8
_PART_PASSES = 4
# Room beyond the average, as a share of it.
_CLUSTER_SLACK = 1.0
_PART_SLACK = 0.05
# Nodes that are placed together, as things were before: at most so many, with so many scores and
# edges.
_BLOCK_NODES = 4096
_BLOCK_SCORES = 1 << 19
_BLOCK_EDGES = 1 << 17
# Edges in a file of consecutive items, and how many files there are at most: each block of edges
# that is read opens all of them.
_BUCKET_EDGES = 1 << 19
_MAX_BUCKETS = 1024
# A place that is as good is not worth a move; below one edge.
_STAY = 0.5
_ROUNDS = 8
_EDGE = np.dtype([("item", "<i4"), ("user", "<i4")])

Labels = dict[NodeType, npt.NDArray[np.int32]]
Ids = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class StreamingPartitioner:
    """Keeps neighbours together as far as the balance allows, without holding edges.

    The weight of a node is 1 + its edges; no part gets more than 1.05 times the average weight of
    users, nor of items, but for what a single node exceeds it by.

    Attributes:
        seed: of the start and of ties; the same seed and graph give the same parts.
        with_similar: whether item-item edges count as well as interactions.
        work: folder for the edges sorted by item, 8 bytes each.
    """

    name: ClassVar[str] = "streaming"
    seed: int
    with_similar: bool
    work: Path

    def assign(self, graph: GraphStreams, num_partitions: int) -> Labels:
        """Return the partition of every node, by node type."""
        if num_partitions == 1:
            return {t: np.zeros(n, np.int32) for t, n in graph.num_nodes.items()}
        rows = EdgeRows(graph, self.work, with_similar=self.with_similar)
        labels = {t: self._scattered(graph, t, _num_clusters(num_partitions)) for t in NODE_TYPES}
        clusters = _Passes(rows, labels, _num_clusters(num_partitions), _CLUSTER_SLACK)
        for _ in range(_CLUSTER_PASSES):
            clusters.run()
        part_of = _merge(clusters.edges_between(), clusters.weights(), num_partitions, self.seed)
        labels = {t: part_of[label] for t, label in labels.items()}
        parts = _Passes(rows, labels, num_partitions, _PART_SLACK)
        for _ in range(_PART_PASSES):
            parts.run()
        shutil.rmtree(self.work)
        return labels

    def _scattered(
        self, graph: GraphStreams, node_type: NodeType, count: int
    ) -> npt.NDArray[np.int32]:
        ids = torch.arange(graph.num_nodes[node_type])
        hashes = hash_ids(ids, salt(self.seed, NODE_TYPES.index(node_type)))
        return uniform_below(hashes, count).to(torch.int32).numpy()


@dataclasses.dataclass(frozen=True)
class Rows:
    """The neighbours of consecutive nodes of one type.

    Attributes:
        first: id of the first node.
        indptr: the neighbours of node ``first + r`` lie at ``indptr[r]`` .. ``indptr[r + 1]``.
        neighbors: ids of nodes of the other type.
        similar_indptr: the same for similar items; None for users.
        similar: ids of items.
    """

    first: int
    indptr: npt.NDArray[np.int64]
    neighbors: npt.NDArray[np.integer]
    similar_indptr: npt.NDArray[np.int64] | None = None
    similar: npt.NDArray[np.integer] | None = None


class EdgeRows:
    """Every node's neighbours, users and items in turn, again and again from disk.

    Attributes:
        graph: whose edges; its interactions are sorted by user.
        weight: node type -> 1 + number of neighbours of each node.
    """

    def __init__(self, graph: GraphStreams, work: Path, *, with_similar: bool) -> None:
        self.graph = graph
        self._with_similar = with_similar
        self._work = work
        self._indptr = {
            t: np.concatenate([[0], np.cumsum(graph.degree[t])]).astype(np.int64)
            for t in NODE_TYPES
        }
        self.weight = {t: 1 + graph.degree[t] for t in NODE_TYPES}
        if with_similar:
            self.weight[ITEM] = self.weight[ITEM] + np.diff(graph.similar.indptr)
        self._cuts = self._sort_by_item()

    def read(self, node_type: NodeType, size: int = _BLOCK_NODES) -> Iterator[Rows]:
        """Yield the rows of all nodes of a type, ascending.

        Which rows come together depends on ``size`` and the nodes' degrees alone, not on the files.

        Args:
            node_type: users or items.
            size: nodes at once at most; fewer where they have many edges.
        """
        if node_type == USER:
            arrays: Iterator[Ids] = (block.target for block in self.graph.blocks(RATES))
        else:
            numbers = range(len(self._cuts) - 1)
            arrays = (np.fromfile(self._path(n), dtype=_EDGE)["user"].copy() for n in numbers)
        for rows in _grouped(arrays, self._indptr[node_type], size):
            yield self._and_similar(rows) if node_type == ITEM and self._with_similar else rows

    def _and_similar(self, rows: Rows) -> Rows:
        similar = self.graph.similar
        pointer = similar.indptr[rows.first : rows.first + len(rows.indptr)]
        inside = np.array(similar.indices[int(pointer[0]) : int(pointer[-1])])
        return dataclasses.replace(rows, similar_indptr=pointer - pointer[0], similar=inside)

    def _sort_by_item(self) -> list[int]:
        """Write the interactions into files of consecutive items; return where these begin."""
        shutil.rmtree(self._work, ignore_errors=True)
        self._work.mkdir(parents=True)
        indptr = self._indptr[ITEM]
        size = max(_BUCKET_EDGES, int(indptr[-1]) // _MAX_BUCKETS)
        wanted = np.arange(0, indptr[-1], size)
        cuts = np.unique(np.concatenate([np.searchsorted(indptr, wanted), [0, len(indptr) - 1]]))
        for block in self.graph.blocks(RATES):
            edges = np.empty(len(block), dtype=_EDGE)
            edges["item"], edges["user"] = block.target, block.source
            bucket = np.searchsorted(cuts, block.target, side="right") - 1
            append_by_bucket(edges, bucket, self._path)
        for number in range(len(cuts) - 1):
            self._path(number).touch()
            edges = np.fromfile(self._path(number), dtype=_EDGE)
            edges[np.argsort(edges["item"], kind="stable")].tofile(self._path(number))
        return [int(cut) for cut in cuts]

    def _path(self, number: int) -> Path:
        return self._work / f"items_{number:06d}.bin"


class _Passes:
    """Labels that get better with every pass; each kind of node has its own loads."""

    def __init__(self, rows: EdgeRows, labels: Labels, count: int, slack: float) -> None:
        self._rows, self._labels, self._count = rows, labels, count
        self._loads = {t: self._load(t) for t in NODE_TYPES}
        self._capacity = {t: (1 + slack) * load.sum() / count for t, load in self._loads.items()}

    def run(self) -> None:
        """Place every user, then every item, block by block."""
        size = max(min(_BLOCK_NODES, _BLOCK_SCORES // self._count), 1)
        for node_type in NODE_TYPES:
            for rows in self._rows.read(node_type, size):
                self._place(node_type, rows)

    def weights(self) -> npt.NDArray[np.int64]:
        """Return the weight of each label, users and items in equal shares of 1000."""
        total = np.zeros(self._count)
        for load in self._loads.values():
            total += 500 * self._count * load / max(load.sum(), 1)
        return 1 + total.astype(np.int64)

    def edges_between(self) -> npt.NDArray[np.int64]:
        """Return the number of neighbours by the labels of both ends, symmetric."""
        count = self._count
        result = np.zeros(count * count, dtype=np.int64)
        for rows in self._rows.read(ITEM):
            last = rows.first + len(rows.indptr) - 1
            own = self._labels[ITEM][rows.first : last].astype(np.int64)
            ends = self._labels[USER][rows.neighbors]
            pairs = np.repeat(own, np.diff(rows.indptr)) * count + ends
            result += np.bincount(pairs, minlength=count * count)
            if rows.similar_indptr is not None:
                ends = self._labels[ITEM][rows.similar]
                pairs = np.repeat(own, np.diff(rows.similar_indptr)) * count + ends
                result += np.bincount(pairs, minlength=count * count)
        square = result.reshape(count, count)
        return square + square.T

    def _load(self, node_type: NodeType) -> npt.NDArray[np.float64]:
        weight = self._rows.weight[node_type]
        load = np.bincount(self._labels[node_type], weight, minlength=self._count)
        return load.astype(np.float64)

    def _place(self, node_type: NodeType, rows: Rows) -> None:
        other = ITEM if node_type == USER else USER
        nodes = slice(rows.first, rows.first + len(rows.indptr) - 1)
        labels, weight = self._labels[node_type][nodes], self._rows.weight[node_type][nodes]
        near = _histogram(rows.indptr, self._labels[other][rows.neighbors], self._count)
        if rows.similar_indptr is not None:
            ends = self._labels[ITEM][rows.similar]
            near += _histogram(rows.similar_indptr, ends, self._count)
        loads, capacity = self._loads[node_type], self._capacity[node_type]
        loads = loads - np.bincount(labels, weight, minlength=self._count)
        near *= np.maximum(1 - loads / capacity, 0.01)
        near[np.arange(len(labels)), labels] += _STAY
        placed = place(near, weight, capacity - loads)
        self._labels[node_type][nodes] = placed
        self._loads[node_type] = loads + np.bincount(placed, weight, minlength=self._count)


def place(
    score: npt.NDArray[np.float64], weight: npt.NDArray[np.int64], room: npt.NDArray[np.float64]
) -> npt.NDArray[np.int32]:
    """Give every node the label of its best score that has room, the best scores first.

    Args:
        score: (nodes, labels); overwritten.
        weight: (nodes,) room that each takes.
        room: (labels,) that there is; nodes for which nothing is left go where most is.
    """
    room = room.copy()
    result = np.full(len(score), -1, dtype=np.int32)
    left = np.arange(len(score))
    for _ in range(min(_ROUNDS, score.shape[1])):
        best = score[left].argmax(axis=1)
        order = np.lexsort((-score[left, best], best))
        left, best = left[order], best[order]
        taken = np.cumsum(weight[left])
        starts = np.searchsorted(best, np.arange(score.shape[1]))
        before = np.concatenate([[0], taken])[starts]
        fits = taken - before[best] <= room[best]
        result[left[fits]] = best[fits]
        room -= np.bincount(best[fits], weight[left[fits]], minlength=len(room))
        score[left[~fits], best[~fits]] = -np.inf
        left = left[~fits]
        if not len(left):
            return result
    emptiest = np.argsort(-room, kind="stable")
    ends = np.cumsum(room[emptiest].clip(min=0))
    places = np.searchsorted(ends, np.cumsum(weight[left]))
    places = np.where(places < len(room), places, np.arange(len(left)) % len(room))
    result[left] = emptiest[places]
    return result


def _merge(
    between: npt.NDArray[np.int64], weight: npt.NDArray[np.int64], count: int, seed: int
) -> npt.NDArray[np.int32]:
    """Return the part of each cluster, by METIS on the graph of clusters."""
    import pymetis

    np.fill_diagonal(between, 0)
    source, target = between.nonzero()
    strength = between[source, target]
    # METIS adds weights up in 32 bits.
    strength = np.maximum(strength // (1 + between.sum() // 2**30), 1)
    starts = np.searchsorted(source, np.arange(len(between) + 1))
    _, parts = pymetis.part_graph(
        count,
        pymetis.CSRAdjacency(starts, target),
        vweights=weight,
        eweights=strength,
        options=pymetis.Options(seed=seed),
    )
    return np.asarray(parts, dtype=np.int32)


def _num_clusters(num_partitions: int) -> int:
    return max(64, min(16 * num_partitions, 1024), 2 * num_partitions)


def _histogram(
    indptr: npt.NDArray[np.int64], labels: npt.NDArray[np.int32], count: int
) -> npt.NDArray[np.float64]:
    rows = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    flat = np.bincount(rows * count + labels, minlength=(len(indptr) - 1) * count)
    return flat.reshape(-1, count).astype(np.float64)


def _grouped(arrays: Iterable[Ids], indptr: npt.NDArray[np.int64], size: int) -> Iterator[Rows]:
    """Yield rows by ``size`` nodes, or by fewer with about ``_BLOCK_EDGES`` edges.

    Args:
        arrays: neighbours of all nodes, one node after another, in pieces of any length.
        indptr: where each node's neighbours begin in them.
        size: nodes at once.
    """
    last_node = len(indptr) - 1
    by_edges = np.searchsorted(indptr, np.arange(0, indptr[-1], _BLOCK_EDGES))
    cuts = np.union1d(np.arange(0, last_node, size), np.append(by_edges, last_node)).tolist()
    groups = itertools.pairwise(cuts)
    first, last = next(groups, (0, 0))
    waiting: Ids | None = None
    arrived = 0
    for array in arrays:
        waiting = array if waiting is None else np.concatenate([waiting, array])
        arrived += len(array)
        while first < last and indptr[last] <= arrived:
            own = indptr[first : last + 1] - indptr[first]
            yield Rows(first, own, waiting[: own[-1]])
            waiting = waiting[own[-1] :]
            first, last = next(groups, (0, 0))
