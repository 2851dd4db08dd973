"""Final representations of all nodes, layer by layer over partitions (sampled training -> rows).

Each rank computes the rows of its own nodes and asks the owners for the rows of their neighbours,
some destination nodes at a time; no rank has a whole table.
"""

import functools
import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from alignrec.align.cold import fill_cold
from alignrec.distributed.exchange import Exchange
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, EdgeType
from alignrec.graph.stores import NeighborLists, PartitionedGraph

# Edges whose source rows are in memory at once: 256 MiB at 64 columns.
_BLOCK_EDGES = 1 << 20
_BLOCK_ITEMS = 8192


class Inference:
    """Exact propagation over the partitioned graph; every rank calls it at the same time."""

    def __init__(
        self,
        graph: PartitionedGraph,
        exchange: Exchange,
        *,
        layers: int,
        content_layers: int,
        cold_from_similar: bool,
    ) -> None:
        self._graph = graph
        self._exchange = exchange
        self._layers = layers
        self._content_layers = content_layers
        cold = graph.degree[ITEM] == 0
        anywhere = cold_from_similar and int(exchange.sum(cold.sum().unsqueeze(0))) > 0
        self._cold = cold if anywhere else None

    @torch.no_grad()
    def represent(
        self,
        user: Float[Tensor, "owned_users d"],
        item: Float[Tensor, "owned_items d"],
        gate: nn.Module | None,
    ) -> tuple[Float[Tensor, "owned_users d"], Float[Tensor, "owned_items d"]]:
        """Return the final representations of this rank's users and items.

        Args:
            user: ID embeddings of this rank's users.
            item: ID embeddings of this rank's items.
            gate: content features -> factor on the ID embedding; None without content.
        """
        h_user, h_item = user, item
        for _ in range(self._layers):
            h_user, h_item = (
                self.pull(REV_RATES, h_item).add_(user),
                self.pull(RATES, h_user).add_(item),
            )
        h_user, h_item = h_user / (self._layers + 1), h_item / (self._layers + 1)
        if self._cold is not None:
            h_item = fill_cold(h_item, self._cold, functools.partial(self.pull, SIMILAR))
        if gate is not None:
            content = self._gated(item, gate)
            for _ in range(self._content_layers):
                content = self.pull(SIMILAR, content)
            h_user, h_item = h_user + self.pull(REV_RATES, content), h_item + content
        return h_user, h_item

    def _gated(self, item: Float[Tensor, "owned_items d"], gate: nn.Module) -> Tensor:
        rows = torch.split(torch.arange(len(item)), _BLOCK_ITEMS)
        blocks = [item[block] * gate(self._graph.features(block).float()) for block in rows]
        return torch.cat([item[:0], *blocks])

    @torch.no_grad()
    def pull(
        self, edge_type: EdgeType, source: Float[Tensor, "owned_sources d"]
    ) -> Float[Tensor, "owned_targets d"]:
        """Return the weighted sum over in-edges of each of this rank's destination nodes."""
        lists = self._graph.neighbors[edge_type]
        blocks = _blocks(lists)
        rounds = int(self._exchange.maximum(torch.tensor([len(blocks)])))
        result = [
            self._pull_block(edge_type, source, lists, *(blocks[k] if k < len(blocks) else (0, 0)))
            for k in range(rounds)
        ]
        return torch.cat([source[:0], *result])

    def _pull_block(
        self, edge_type: EdgeType, source: Tensor, lists: NeighborLists, first: int, last: int
    ) -> Tensor:
        kind, graph = edge_type[0], self._graph
        offsets = lists.indptr[first : last + 1]
        edges = slice(int(offsets[0]), int(offsets[-1]))
        distinct, position = torch.unique(lists.source[edges].long(), return_inverse=True)
        route = self._exchange.send(distinct, graph.owner_of(kind, distinct))
        rows = route.reply(source[graph.local_rows(kind, route.received)])
        if last == first:
            return source[:0]
        return functional.embedding_bag(
            position,
            rows,
            offsets - offsets[0],
            mode="sum",
            per_sample_weights=lists.weight[edges],
            include_last_offset=True,
        )


def _blocks(lists: NeighborLists) -> list[tuple[int, int]]:
    """Cut the lists into consecutive ranges of about ``_BLOCK_EDGES`` edges each."""
    num_lists = len(lists.indptr) - 1
    if num_lists == 0:
        return []
    targets = torch.tensor(range(_BLOCK_EDGES, int(lists.indptr[-1]), _BLOCK_EDGES))
    inner = torch.unique(torch.searchsorted(lists.indptr, targets)).tolist()
    cuts = [0, *(cut for cut in inner if 0 < cut < num_lists), num_lists]
    return list(itertools.pairwise(cuts))
