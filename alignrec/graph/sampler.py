"""Neighbour sampling across ranks, hop by hop (stores -> loader).

PyG's own distributed sampler asks other machines one remote call at a time and depends on who asks.
This one asks all owners at once by ``exchange``, and what a node's sample is depends on (seed,
epoch, edge type, hop, node) alone. docs/design/graph_sampling.md says what a batch holds.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float32, Int, Int64
from torch import Tensor
from torch_geometric.sampler import (
    BaseSampler,
    EdgeSamplerInput,
    HeteroSamplerOutput,
    NegativeSampling,
    NodeSamplerInput,
)

from alignrec.distributed.exchange import Exchange
from alignrec.graph.caching import Traffic
from alignrec.graph.negatives import Positives, draw_negatives
from alignrec.graph.neighborhoods import Neighborhoods
from alignrec.graph.schema import (
    EDGE_TYPES,
    ITEM,
    NODE_TYPES,
    RATES,
    REV_RATES,
    SIMILAR,
    USER,
    EdgeType,
    NodeType,
)
from alignrec.graph.stores import PartitionedGraph


@dataclasses.dataclass(frozen=True)
class Extras:
    """What a batch holds beyond PyG's sampler output.

    Attributes:
        weight: edge type -> weight of each sampled edge.
        content_index: positions among the batch's items of those whose content is needed.
        with_content: whether there are content layers.
        seeds: node type -> position of each seed, in the order given.
    """

    weight: dict[EdgeType, Float32[Tensor, " edges"]]
    content_index: Int64[Tensor, " content"]
    with_content: bool
    seeds: dict[NodeType, Int64[Tensor, " n"]]


class NeighborSampler(BaseSampler):  # type: ignore[misc]
    """Samples user-item neighbours for L layers and similar items for the content layers.

    Sampling is collective: every rank samples equally often, with as many seeds as it has.

    Attributes:
        num_neighbors: fanout of ``rates`` and ``rev_rates`` at each hop; -1 takes all.
        similar_neighbors: fanout of ``similar`` at each content layer; empty without content.
        seed: of all samples.
        epoch: samples differ from epoch to epoch; set it before sampling.
        traffic: counts the nodes that are sampled.
    """

    def __init__(
        self,
        graph: PartitionedGraph,
        exchange: Exchange,
        *,
        num_neighbors: Sequence[int],
        similar_neighbors: Sequence[int],
        seed: int,
        cache_bytes: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        """Prepare to sample; not collective.

        Args:
            graph: this rank's share.
            exchange: with the other ranks.
            num_neighbors: see above.
            similar_neighbors: see above.
            seed: see above.
            cache_bytes: memory for samples of other ranks' nodes; changes no sample.
            traffic: where to count; None counts in one of its own.
        """
        _check_fanouts(num_neighbors, similar_neighbors)
        super().__init__()
        self.num_neighbors = tuple(num_neighbors)
        self.similar_neighbors = tuple(similar_neighbors)
        self.seed = seed
        self.epoch = 0
        self.traffic = traffic or Traffic()
        self._graph = graph
        self._neighborhoods = Neighborhoods(
            graph,
            exchange,
            seed=seed,
            cache_bytes=cache_bytes // max(1, self._num_rounds()),
            traffic=self.traffic,
        )
        own = graph.neighbors[REV_RATES]
        self._positives = Positives.indexed(own.indptr, own.source, graph.num_nodes[ITEM])
        self._tables = {t: NodeTable(graph.num_nodes[t]) for t in NODE_TYPES}

    def sample_from_nodes(self, index: NodeSamplerInput, **_: object) -> HeteroSamplerOutput:
        """Sample around seed nodes of one type; equal seeds are allowed."""
        seeds = {index.input_type: index.node.to(torch.int64)}
        output, extras = self._sample(seeds)
        output.metadata = (index.input_id, index.time, extras)
        return output

    def sample_from_edges(
        self, index: EdgeSamplerInput, neg_sampling: NegativeSampling | None = None
    ) -> HeteroSamplerOutput:
        """Draw negatives for interactions of this rank's users and sample around all their nodes.

        Args:
            index: users and items of the interactions, by global id.
            neg_sampling: of mode triplet; its amount is the number of negatives of each.
        """
        if neg_sampling is None or not neg_sampling.is_triplet():
            raise ValueError(
                f"neg_sampling={neg_sampling}: only triples of user, item and negatives are "
                f"sampled here. Pass NegativeSampling('triplet', amount)."
            )
        users, items = index.row.to(torch.int64), index.col.to(torch.int64)
        negatives = draw_negatives(
            users,
            items,
            rows=self._graph.local_rows(USER, users),
            positives=self._positives,
            candidates=self._graph.train_items,
            seed=self.seed,
            epoch=self.epoch,
            num_negatives=neg_sampling.amount,
        )
        output, extras = self._sample({USER: users, ITEM: torch.cat([items, negatives.ravel()])})
        positive, negative = extras.seeds[ITEM].tensor_split([len(items)])
        if neg_sampling.amount > 1:
            negative = negative.view(-1, neg_sampling.amount)
        output.metadata = (
            index.input_id,
            extras.seeds[USER],
            positive,
            negative,
            index.time,
            extras,
        )
        return output

    def _sample(
        self, seeds: dict[NodeType, Int64[Tensor, " n"]]
    ) -> tuple[HeteroSamplerOutput, Extras]:
        """Return the nodes and edges around the seeds, and what goes with them."""
        tables = self._tables
        try:
            positions = {t: tables[t].positions(ids) for t, ids in seeds.items()}
            edges = self._expand(positions)
            node = {t: torch.from_numpy(tables[t].ids()) for t in NODE_TYPES}
        finally:
            for table in tables.values():
                table.clear()
        output = HeteroSamplerOutput(
            node=node,
            row={t: _join(e.source for e in edges.hops[t]) for t in edges.hops},
            col={t: _join(e.target for e in edges.hops[t]) for t in edges.hops},
            edge={},
            num_sampled_nodes=edges.num_sampled_nodes,
            num_sampled_edges={t: [len(e.source) for e in hops] for t, hops in edges.hops.items()},
        )
        weight = {
            t: torch.cat([torch.empty(0), *(e.weight for e in hops)])
            for t, hops in edges.hops.items()
        }
        return output, Extras(weight, edges.content, bool(self.similar_neighbors), positions)

    def _num_rounds(self) -> int:
        """Return how often a batch asks for neighbours: content layers start one round later."""
        depth, layers = len(self.num_neighbors), len(self.similar_neighbors)
        return max(depth, 1 + layers) if layers else depth

    def _expand(self, positions: dict[NodeType, Int64[Tensor, " n"]]) -> "_Expansion":
        """Walk outwards from the seeds: user-item hops, and content layers one round behind."""
        depth, layers = len(self.num_neighbors), len(self.similar_neighbors)
        empty = torch.empty(0, dtype=torch.int64)
        frontier = {t: self._distinct(t, positions.get(t, empty)) for t in NODE_TYPES}
        content = frontier[ITEM]
        result = _Expansion({t: [] for t in EDGE_TYPES}, {t: [] for t in NODE_TYPES}, empty)
        self._count_nodes(result)
        for step in range(self._num_rounds()):
            layer = step - 1
            asked: dict[EdgeType, Tensor] = {}
            fanouts: dict[EdgeType, int] = {}
            if step < depth:
                asked |= {RATES: frontier[ITEM], REV_RATES: frontier[USER]}
                fanouts |= dict.fromkeys((RATES, REV_RATES), self.num_neighbors[step])
            if 0 <= layer < layers:
                asked[SIMILAR] = content
                fanouts[SIMILAR] = self.similar_neighbors[layer]
            hops = self._sample_hop(asked, fanouts, step)
            for edge_type, edges in hops.items():
                result.hops[edge_type].append(edges)
            if step < depth:
                frontier = {
                    ITEM: self._distinct(ITEM, hops[REV_RATES].source),
                    USER: self._distinct(USER, hops[RATES].source),
                }
            if step == 0:
                content = self._distinct(ITEM, torch.cat([content, frontier[ITEM]]))
            elif SIMILAR in hops:
                content = self._distinct(ITEM, hops[SIMILAR].source)
            self._count_nodes(result)
        return dataclasses.replace(result, content=content if layers else empty)

    def _count_nodes(self, result: "_Expansion") -> None:
        for node_type, counts in result.num_sampled_nodes.items():
            counts.append(len(self._tables[node_type]) - sum(counts))

    def _distinct(
        self, node_type: NodeType, positions: Int64[Tensor, " n"]
    ) -> Int64[Tensor, " distinct"]:
        """Return distinct positions in ascending order, by marking instead of sorting."""
        marks = torch.zeros(len(self._tables[node_type]), dtype=torch.bool)
        marks[positions] = True
        return marks.nonzero()[:, 0]

    def _sample_hop(
        self, asked: dict[EdgeType, Tensor], fanouts: dict[EdgeType, int], step: int
    ) -> dict[EdgeType, "_Edges"]:
        """Sample the in-edges of the given destination nodes, all types at once.

        Args:
            asked: edge type -> positions of distinct destination nodes.
            fanouts: edge type -> edges to sample for each.
            step: number of the round, part of what the sample depends on.
        """
        ids = {t: self._tables[t[2]].ids_at(targets) for t, targets in asked.items()}
        drawn = self._neighborhoods.sample(ids, fanouts, epoch=self.epoch, step=step)
        lengths, sources, weights = drawn.lengths, drawn.source, drawn.weight
        result = {}
        for edge_type, targets in asked.items():
            count, lengths = lengths[: len(targets)], lengths[len(targets) :]
            total = int(count.sum())
            result[edge_type] = _Edges(
                self._tables[edge_type[0]].positions(sources[:total]),
                targets.repeat_interleave(count),
                weights[:total],
            )
            sources, weights = sources[total:], weights[total:]
        return result


class NodeTable:
    """Numbers the distinct nodes of a batch in the order in which they first appear.

    The map from id to number is allocated once and cleared by what was entered, so a batch costs
    nothing for the nodes that are not in it; sorting the frontier (``unique``) takes several times
    the memory and time.
    """

    def __init__(self, num_nodes: int) -> None:
        self._number = np.full(num_nodes, -1, dtype=np.int32)
        self._parts: list[np.ndarray] = []
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def positions(self, ids: Int[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return each id's number, entering the new ones."""
        wanted = ids.numpy()
        number = self._number
        found = number[wanted]
        unseen = wanted[found < 0]
        if len(unseen):
            order = np.arange(len(unseen), dtype=np.int32)
            number[unseen[::-1]] = order[::-1]  # of equal ids the first occurrence is written last
            fresh = unseen[number[unseen] == order].astype(np.int64)
            number[fresh] = np.arange(self._count, self._count + len(fresh), dtype=np.int32)
            self._parts.append(fresh)
            self._count += len(fresh)
            found = number[wanted]
        return torch.from_numpy(found.astype(np.int64))

    def ids(self) -> np.ndarray:
        """Return the entered ids by number."""
        if len(self._parts) != 1:
            self._parts = [np.concatenate([np.empty(0, np.int64), *self._parts])]
        return self._parts[0]

    def ids_at(self, positions: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the ids that have these numbers."""
        return torch.from_numpy(self.ids())[positions]

    def clear(self) -> None:
        """Forget the batch."""
        self._number[self.ids()] = -1
        self._parts = []
        self._count = 0


@dataclasses.dataclass(frozen=True)
class _Edges:
    """Sampled edges of one type and hop: positions of both ends in the batch, and weights."""

    source: Int64[Tensor, " edges"]
    target: Int64[Tensor, " edges"]
    weight: Float32[Tensor, " edges"]


@dataclasses.dataclass(frozen=True)
class _Expansion:
    """Sampled edges by type and hop, nodes first reached in each round, items of the last layer."""

    hops: dict[EdgeType, list[_Edges]]
    num_sampled_nodes: dict[NodeType, list[int]]
    content: Int64[Tensor, " content"]


def _join(parts: object) -> Int64[Tensor, " edges"]:
    return torch.cat([torch.empty(0, dtype=torch.int64), *parts])  # type: ignore[misc]


def _check_fanouts(num_neighbors: Sequence[int], similar_neighbors: Sequence[int]) -> None:
    if any(k == 0 or k < -1 for k in (*num_neighbors, *similar_neighbors)):
        raise ValueError(
            f"fanouts {list(num_neighbors)} and {list(similar_neighbors)} must be positive, or -1 "
            f"for all neighbours: a hop of 0 would cut off every layer beyond it."
        )
    if similar_neighbors and not num_neighbors:
        raise ValueError(
            "a user's content is the mean of the user's items, so content layers need at least "
            "one user-item hop. Give num_neighbors one fanout or more."
        )
