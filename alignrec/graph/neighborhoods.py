"""Samples of any nodes' neighbours: drawn here, remembered, or asked of their owners.

Between the stores, which hold this rank's lists, and the sampler, which walks. What a node's
sample is depends on (seed, epoch, edge type, round, node) alone, so within an epoch another rank's
answer stays right, and popular nodes are asked for once.
"""

import dataclasses
from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float32, Int, Int32, Int64
from torch import Tensor

from alignrec.distributed.exchange import Exchange, Route, ragged_index
from alignrec.graph.caching import SampleCache, Traffic
from alignrec.graph.drawing import sample_lists
from alignrec.graph.hashing import hash_ids, salt
from alignrec.graph.schema import EDGE_TYPES, EdgeType
from alignrec.graph.stores import PartitionedGraph

_STREAM = 0x484F50
# Most edges of a node that travel as a row of fixed length, 260 bytes: mean lists are shorter.
_MAX_WIDTH = 32


@dataclasses.dataclass(frozen=True)
class Samples:
    """Sampled in-edges of some nodes, one list after another.

    Attributes:
        lengths: of each node's list.
        source: global ids of the edges' source nodes.
        weight: what a message along the edge is multiplied by.
    """

    lengths: Int64[Tensor, " n"]
    source: Int[Tensor, " edges"]
    weight: Float32[Tensor, " edges"]


@dataclasses.dataclass(frozen=True)
class _Round:
    """What the samples of a round of asking depend on, beside the node."""

    fanouts: Mapping[EdgeType, int]
    epoch: int
    step: int

    @property
    def width(self) -> int | None:
        """Most edges of a node in this round; None if they are too many for rows of one length."""
        largest = max(self.fanouts.values(), default=0)
        return None if -1 in self.fanouts.values() or largest > _MAX_WIDTH else largest


@dataclasses.dataclass(frozen=True)
class _Places:
    """Where the nodes that were asked for are: of ``total`` nodes some are here, others not.

    A key is a node id that also tells the edge type (``Neighborhoods.first_key``).
    """

    total: int
    own: Int64[Tensor, " own"]
    own_keys: Int64[Tensor, " own"]
    foreign: Int64[Tensor, " foreign"]
    keys: Int64[Tensor, " foreign"]


class Neighborhoods:
    """Samples in-edges of nodes of the whole graph; collective.

    Attributes:
        first_key: edge type -> key of its destination node 0; keys of a type are consecutive.
    """

    def __init__(
        self,
        graph: PartitionedGraph,
        exchange: Exchange,
        *,
        seed: int,
        cache_bytes: int,
        traffic: Traffic,
    ) -> None:
        """Prepare to sample; not collective.

        Args:
            graph: this rank's share.
            exchange: with the other ranks.
            seed: of all samples.
            cache_bytes: memory in each round for samples of other ranks' nodes.
            traffic: counts the nodes that are sampled.
        """
        self._graph = graph
        self._exchange = exchange
        self._seed = seed
        self._cache_bytes = cache_bytes
        self._traffic = traffic
        self._caches: dict[int, SampleCache | None] = {}
        sizes = [graph.num_nodes[edge_type[2]] for edge_type in EDGE_TYPES]
        self.first_key = {t: sum(sizes[:kind]) for kind, t in enumerate(EDGE_TYPES)}

    def sample(
        self,
        asked: Mapping[EdgeType, Int64[Tensor, " n"]],
        fanouts: Mapping[EdgeType, int],
        *,
        epoch: int,
        step: int,
    ) -> Samples:
        """Sample the in-edges of nodes, of several types in one go.

        Args:
            asked: edge type -> distinct destination nodes, by global id.
            fanouts: edge type -> edges to sample for each node; -1 takes all.
            epoch: counted from 0.
            step: number of the round in which a batch asks.

        Returns:
            One list for each node, in the order of ``asked``.
        """
        this = _Round(fanouts, epoch, step)
        if self._exchange.world_size == 1:
            keys = torch.cat([ids + self.first_key[t] for t, ids in asked.items()])
            self._traffic.add(nodes=len(keys))
            return self._draw(keys, this)
        places = self._places(asked)
        cache = self._cache(this)
        known = None if cache is None else cache.find(places.keys)
        absent = _absent(known, len(places.keys))
        question = self._exchange.ask(places.keys[absent], self._owners(places.keys[absent]))
        own = self._draw(places.own_keys, this)  # while the counts of the question travel
        self._traffic.add(
            nodes=places.total,
            remote_nodes=len(places.keys),
            cached_nodes=len(places.keys) - len(absent),
        )
        route = question.route()
        answer = self._draw(route.received, this)
        if this.width is None:
            lengths, source, weight = route.reply_ragged(
                answer.lengths, answer.source, answer.weight
            )
            return _merge(places, own, Samples(lengths, source, weight))
        rows = self._take(places, known, absent, route, pack(answer, this.width), cache)
        return _merge(places, own, unpack(rows, this.width))

    def _take(
        self,
        places: _Places,
        known: Int64[Tensor, " foreign"] | None,
        absent: Int64[Tensor, " absent"],
        route: Route,
        answer: Int32[Tensor, "received row"],
        cache: SampleCache | None,
    ) -> Int32[Tensor, "foreign row"]:
        """Reply to the others and return the rows of all foreign nodes, remembered or not."""
        arrival = route.begin_reply(answer)
        if cache is None or known is None:
            rows = answer.new_empty((len(places.keys), answer.shape[1]))
        else:
            rows = cache.read(known)
        absent = route.by_owner(absent)
        arrived = arrival.wait()
        rows[absent] = arrived
        if cache is not None:
            cache.keep(places.keys[absent], arrived)
        return rows

    def _cache(self, this: _Round) -> SampleCache | None:
        """Return the cache of a round, emptied at the start of an epoch."""
        if this.width is None or self._cache_bytes == 0:
            return None
        if this.step not in self._caches:
            kinds = [edge_type[2] for edge_type in EDGE_TYPES]
            foreign = sum(self._graph.num_nodes[t] - len(self._graph.owned[t]) for t in kinds)
            self._caches[this.step] = SampleCache.within(
                self._cache_bytes, num_rows=foreign, width=1 + 2 * this.width
            )
        cache = self._caches[this.step]
        if cache is not None:
            cache.start_epoch(this.epoch)
        return cache

    def _places(self, asked: Mapping[EdgeType, Int64[Tensor, " n"]]) -> _Places:
        own: list[Tensor] = []
        own_keys: list[Tensor] = []
        foreign: list[Tensor] = []
        keys: list[Tensor] = []
        first = 0
        for edge_type, ids in asked.items():
            here = self._graph.local_rows(edge_type[2], ids) >= 0
            for chosen, places, codes in ((here, own, own_keys), (~here, foreign, keys)):
                index = chosen.nonzero()[:, 0]
                places.append(index + first)
                codes.append(ids.index_select(0, index) + self.first_key[edge_type])
            first += len(ids)
        return _Places(
            first, torch.cat(own), torch.cat(own_keys), torch.cat(foreign), torch.cat(keys)
        )

    def _owners(self, keys: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        owners = torch.empty_like(keys)
        for edge_type, chosen in self._by_type(keys):
            ids = keys[chosen] - self.first_key[edge_type]
            owners[chosen] = self._graph.owner_of(edge_type[2], ids)
        return owners

    def _by_type(self, keys: Int64[Tensor, " n"]) -> list[tuple[EdgeType, Int64[Tensor, " m"]]]:
        """Return for each edge type which keys are of it."""
        result = []
        for edge_type, first in self.first_key.items():
            last = first + self._graph.num_nodes[edge_type[2]]
            chosen: Bool[Tensor, " n"] = (keys >= first) & (keys < last)
            result.append((edge_type, chosen.nonzero()[:, 0]))
        return result

    def _draw(self, keys: Int64[Tensor, " n"], this: _Round) -> Samples:
        """Sample for nodes that this rank owns."""
        graph = self._graph
        lists, fanout, hashes = (torch.empty_like(keys) for _ in range(3))
        for kind, (edge_type, own) in enumerate(self._by_type(keys)):
            if len(own) == 0:
                continue
            ids = keys[own] - self.first_key[edge_type]
            lists[own] = graph.local_rows(edge_type[2], ids) + graph.first_list[edge_type]
            fanout[own] = this.fanouts[edge_type]
            hashes[own] = hash_ids(ids, salt(self._seed, this.epoch, _STREAM, kind, this.step))
        return Samples(*sample_lists(graph.lists, lists, fanout, hashes))


def pack(samples: Samples, width: int) -> Int32[Tensor, "n row"]:
    """Put each list of at most ``width`` edges in a row: length, sources, bits of the weights."""
    rows = torch.zeros((len(samples.lengths), 1 + 2 * width), dtype=torch.int32)
    rows[:, 0] = samples.lengths
    starts = torch.arange(len(rows)) * rows.shape[1] + 1
    places = ragged_index(starts, samples.lengths)
    flat = rows.view(-1)
    flat[places] = samples.source.to(torch.int32)
    flat[places + width] = samples.weight.view(torch.int32)
    return rows


def unpack(rows: Int32[Tensor, "n row"], width: int) -> Samples:
    """Undo ``pack``."""
    lengths = rows[:, 0].to(torch.int64)
    source, weight = rows[:, 1 : 1 + width], rows[:, 1 + width :]
    if bool((lengths == width).all()):  # mostly: nodes with many neighbours are reached most
        flat = source.reshape(-1), weight.reshape(-1)
    else:
        filled = torch.arange(width) < lengths[:, None]
        flat = source[filled], weight[filled]
    return Samples(lengths, flat[0], flat[1].view(torch.float32))


def _absent(known: Int64[Tensor, " n"] | None, total: int) -> Int64[Tensor, " absent"]:
    return torch.arange(total) if known is None else (known < 0).nonzero()[:, 0]


def _merge(places: _Places, own: Samples, foreign: Samples) -> Samples:
    """Put the lists of both kinds of nodes in the order in which the nodes were asked for."""
    lengths, starts = (torch.empty(places.total, dtype=torch.int64) for _ in range(2))
    lengths[places.own], lengths[places.foreign] = own.lengths, foreign.lengths
    starts[places.own] = own.lengths.cumsum(0) - own.lengths
    starts[places.foreign] = foreign.lengths.cumsum(0) - foreign.lengths + len(own.source)
    picked = ragged_index(starts, lengths)
    return Samples(
        lengths,
        torch.cat([own.source, foreign.source]).index_select(0, picked),
        torch.cat([own.weight, foreign.weight]).index_select(0, picked),
    )
