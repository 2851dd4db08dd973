"""Mini-batches of training triples and of nodes, on any number of ranks (sampler -> trainer)."""

import dataclasses
import math
import queue
import threading
import time
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int, Int64
from torch import Tensor
from torch_geometric.data import HeteroData
from torch_geometric.loader import LinkLoader, NodeLoader
from torch_geometric.sampler import HeteroSamplerOutput, NegativeSampling

from alignrec.distributed.exchange import Exchange
from alignrec.graph.caching import Traffic
from alignrec.graph.hashing import hash_ids, salt, uniform
from alignrec.graph.sampler import Extras, NeighborSampler
from alignrec.graph.schema import ITEM, RATES, NodeType
from alignrec.graph.stores import DistributedFeatures, PartitionedGraph

_STREAM = 0x4F5244


@dataclasses.dataclass(frozen=True)
class TripleSettings:
    """What decides the training batches.

    Attributes:
        num_neighbors: user-item fanout of each propagation layer; -1 takes all.
        similar_neighbors: item-item fanout of each content layer; empty without content.
        global_batch_size: triples in a step over all ranks, on average.
        num_negatives: negative items for each interaction.
        seed: of order, negatives and samples.
        cache_bytes: memory for content features of other ranks' items; changes no batch.
        sample_cache_bytes: memory for samples of other ranks' nodes; changes no batch.
    """

    num_neighbors: tuple[int, ...]
    similar_neighbors: tuple[int, ...]
    global_batch_size: int
    num_negatives: int = 1
    seed: int = 0
    cache_bytes: int = 1 << 27
    sample_cache_bytes: int = 1 << 27


class TripleLoader(LinkLoader):  # type: ignore[misc]
    """Every training interaction once an epoch over all ranks, with negatives and neighbourhoods.

    A rank gets the interactions of the users that it owns. All ranks do ``num_steps`` steps.

    Attributes:
        num_steps: steps in an epoch.
        traffic: what sampling has asked of other ranks; hand it to ``prefetch`` too.
    """

    def __init__(
        self, graph: PartitionedGraph, exchange: Exchange, settings: TripleSettings
    ) -> None:
        users, items = graph.training_edges()
        self.num_steps = math.ceil(graph.num_edges[RATES] / settings.global_batch_size)
        self._order = TripleOrder(users, items, seed=settings.seed, num_steps=self.num_steps)
        self._exchange = exchange
        self.traffic = Traffic()
        sampler = NeighborSampler(
            graph,
            exchange,
            num_neighbors=settings.num_neighbors,
            similar_neighbors=settings.similar_neighbors,
            seed=settings.seed,
            cache_bytes=settings.sample_cache_bytes,
            traffic=self.traffic,
        )
        features = DistributedFeatures(
            graph, exchange, joined=(), cache_bytes=settings.cache_bytes, traffic=self.traffic
        )
        super().__init__(
            # Content is looked up below, for the items that need it instead of for all.
            data=(features, graph),
            link_sampler=sampler,
            edge_label_index=(RATES, torch.stack([users, items])),
            neg_sampling=NegativeSampling("triplet", settings.num_negatives),
            batch_sampler=self._order,
            generator=torch.Generator(),  # iterating must not draw from the global generator
        )
        self.edge_label_index = None  # PyG keeps copies in input_data

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[HeteroData]:
        """Yield the batches of an epoch from ``first_step`` on; collective at every step.

        Args:
            epoch: counted from 0.
            first_step: steps of this epoch that were done before a resume.
        """
        self.link_sampler.epoch = epoch
        counts = self._exchange.sum(self._order.start(epoch, first_step)).tolist()
        for step, batch in enumerate(self, start=first_step):
            batch.step = step
            batch.num_triples = counts[step]
            yield batch

    def filter_fn(self, out: HeteroSamplerOutput) -> HeteroData:
        """Join sampled nodes and edges with weights and content (called by PyG)."""
        batch = super().filter_fn(out)
        return attach_extras(batch, out.metadata[-1], self.data[0])


class NodeBatchLoader(NodeLoader):  # type: ignore[misc]
    """Batches around given nodes, e.g. to compute their representations.

    Each rank brings its own nodes, as many as it likes; all ranks do as many steps as the one with
    the most. ``batch[node_type].seed_index`` are the positions of the step's nodes in the batch, in
    the order given; a rank that has run out gets empty batches.
    """

    def __init__(
        self,
        graph: PartitionedGraph,
        exchange: Exchange,
        node_type: NodeType,
        ids: Int64[Tensor, " n"],
        *,
        num_neighbors: Sequence[int],
        similar_neighbors: Sequence[int],
        batch_size: int,
        seed: int = 0,
    ) -> None:
        steps = exchange.maximum(torch.tensor([math.ceil(len(ids) / batch_size)]))
        self._node_type = node_type
        sampler = NeighborSampler(
            graph,
            exchange,
            num_neighbors=num_neighbors,
            similar_neighbors=similar_neighbors,
            seed=seed,
        )
        super().__init__(
            data=(DistributedFeatures(graph, exchange, joined=()), graph),
            node_sampler=sampler,
            input_nodes=(node_type, ids),
            batch_sampler=_Slices(len(ids), batch_size, int(steps)),
            generator=torch.Generator(),
        )

    def filter_fn(self, out: HeteroSamplerOutput) -> HeteroData:
        """Join sampled nodes and edges with weights and content (called by PyG)."""
        batch = super().filter_fn(out)
        extras: Extras = out.metadata[-1]
        batch[self._node_type].seed_index = extras.seeds[self._node_type]
        return attach_extras(batch, extras, self.data[0])


class TripleOrder:
    """Which interactions a rank processes at each step of an epoch.

    Each interaction's hash under (seed, epoch) is a number in [0, 1), and step s of S takes those
    in [s/S, (s+1)/S): a shuffle without an order to store or to communicate. The sizes of the
    steps vary by about the square root of the batch size.
    """

    def __init__(
        self, users: Int[Tensor, " n"], items: Int[Tensor, " n"], *, seed: int, num_steps: int
    ) -> None:
        self._users, self._items = users, items
        self._seed = seed
        self._num_steps = num_steps
        self._first_step = 0
        self._edges = torch.empty(0, dtype=torch.int64)
        self._ends = torch.zeros(num_steps, dtype=torch.int64)

    def start(self, epoch: int, first_step: int) -> Int64[Tensor, " num_steps"]:
        """Order this rank's interactions for an epoch and return how many each step has."""
        users = hash_ids(self._users.to(torch.int64), salt(self._seed, epoch, _STREAM))
        places = uniform(hash_ids(self._items.to(torch.int64), users))
        steps = (places * self._num_steps).to(torch.int32)
        self._edges = torch.argsort(steps, stable=True)
        counts = torch.bincount(steps, minlength=self._num_steps)
        self._ends = counts.cumsum(0)
        self._first_step = first_step
        return counts

    def __len__(self) -> int:
        return self._num_steps - self._first_step

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of each step's interactions, as PyG's loaders want them."""
        for positions in self.positions():
            yield positions.tolist()

    def positions(self) -> Iterator[Int64[Tensor, " m"]]:
        """Yield the positions of each step's interactions in the rank's list."""
        ends = [0, *self._ends.tolist()]
        for step in range(self._first_step, self._num_steps):
            yield self._edges[ends[step] : ends[step + 1]]


@dataclasses.dataclass(frozen=True)
class _Slices:
    """Consecutive batches of positions, with empty ones at the end."""

    total: int
    size: int
    num_steps: int

    def __len__(self) -> int:
        return self.num_steps

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.num_steps):
            first = min(step * self.size, self.total)
            yield list(range(first, min(first + self.size, self.total)))


def attach_extras(batch: HeteroData, extras: Extras, features: DistributedFeatures) -> HeteroData:
    """Add edge weights and the content features that the batch needs; collective."""
    for edge_type, weight in extras.weight.items():
        batch[edge_type].weight = weight
    items = batch[ITEM]
    items.content_index = extras.content_index
    if extras.with_content:
        wanted = items.n_id[extras.content_index]
        order = features.own_first(wanted)
        items.content_index = extras.content_index[order]
        items.content_x = features.content(wanted[order])
    return batch


def prefetch(
    batches: Iterator[HeteroData], *, depth: int, traffic: Traffic | None = None
) -> Iterator[HeteroData]:
    """Make up to ``depth`` batches ahead in a thread; ``traffic`` counts the wait for them.

    The batches' exchange must have a process group of its own. When the consumer stops early, the
    thread still makes the batches up to ``depth`` ahead, so that ranks that stop after the same
    batch have sampled equally often; close the iterator (``contextlib.closing``) to wait for that.
    """
    done: queue.Queue[HeteroData | BaseException | None] = queue.Queue()
    window = _Window(depth)

    def produce() -> None:
        try:
            while window.may_make() and (batch := next(batches, None)) is not None:
                done.put(batch)
            done.put(None)
        except BaseException as error:  # raised again in the consumer
            done.put(error)

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            started = time.monotonic()
            entry = done.get()
            if traffic is not None:
                traffic.add(wait_seconds=time.monotonic() - started)
            if entry is None:
                return
            if isinstance(entry, BaseException):
                raise entry
            yield entry
            window.taken()
    finally:
        window.close()
        thread.join()


class _Window:
    """How many batches the producer may be ahead of the consumer."""

    def __init__(self, depth: int) -> None:
        self._room = depth
        self._closed = False
        self._change = threading.Condition()

    def may_make(self) -> bool:
        """Wait until one more batch may be made; False when it never will be."""
        with self._change:
            self._change.wait_for(lambda: self._room > 0 or self._closed)
            self._room -= 1
            return self._room >= 0

    def taken(self) -> None:
        """Make room for one more batch."""
        with self._change:
            self._room += 1
            self._change.notify()

    def close(self) -> None:
        """Let the producer fill the room that there is, and stop."""
        with self._change:
            self._closed = True
            self._change.notify()
