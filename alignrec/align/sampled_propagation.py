"""Propagation over the sampled edges of a batch (loader -> representations).

A batch's nodes are numbered in the order in which sampling reaches them, so the nodes within h hops
of the seeds come first, and nothing is computed for the others at that hop: most nodes of a batch
are leaves, whose embeddings are read once and get one gradient.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torch_geometric.data import HeteroData

from alignrec.align.objective import Representations
from alignrec.align.propagation import SparseMatrix, SparseRows
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType, NodeType


@dataclasses.dataclass(frozen=True, eq=False)
class Hop:
    """The sampled edges of one hop, from the nodes within it to those one hop nearer."""

    to_user: SparseMatrix
    to_item: SparseMatrix


def represent(
    batch: HeteroData,
    embedding: Mapping[NodeType, Float[Tensor, "nodes d"]],
    gate: Float[Tensor, "content d"] | None,
) -> Representations:
    """Propagate over a batch's sampled edges (``docs/design/graph_sampling.md``).

    Args:
        batch: sampled nodes and edges.
        embedding: ID embeddings of the batch's nodes.
        gate: factor for each of the items whose content is needed; None without content.

    Returns:
        Rows of the batch's seeds, which are its first nodes.
    """
    reach = {t: list(itertools.accumulate(batch[t].num_sampled_nodes)) for t in (USER, ITEM)}
    users, items = reach[USER], reach[ITEM]
    hops = [
        Hop(
            _matrix(batch, REV_RATES, hop, (users[hop], items[hop + 1])),
            _matrix(batch, RATES, hop, (items[hop], users[hop + 1])),
        )
        for hop in range(len(batch[RATES].num_sampled_edges))
    ]
    index = batch[ITEM].content_index
    user, item, chosen = _Propagation.apply(embedding[USER], embedding[ITEM], hops, index)  # type: ignore[no-untyped-call]
    if gate is None:
        return Representations(user, item)
    content = chosen * gate
    for layer in reversed(range(len(batch[SIMILAR].num_sampled_edges))):
        shape = (items[layer + 1], len(content))
        content = _matrix(batch, SIMILAR, layer, shape, sources=index).multiply(content)
        index = None
    return Representations(user, item, hops[0].to_user.multiply(content), content[: items[0]])


def _matrix(
    batch: HeteroData,
    edge_type: EdgeType,
    hop: int,
    shape: tuple[int, int],
    *,
    sources: Int64[Tensor, " num_columns"] | None = None,
) -> SparseMatrix:
    """Return a hop's edges as a matrix from source to destination nodes.

    Args:
        batch: sampled nodes and edges; those of a hop are grouped by destination, ascending.
        edge_type: of the edges.
        hop: which of the edge type's.
        shape: numbers of destination and of source nodes.
        sources: the nodes that the columns stand for; None: column c is node c.
    """
    edges = batch[edge_type]
    first = sum(edges.num_sampled_edges[:hop])
    chosen = slice(first, first + edges.num_sampled_edges[hop])
    source, target = edges.edge_index[:, chosen]
    weight = edges.weight[chosen]
    if sources is not None:
        column = source.new_empty(len(batch[edge_type[0]].n_id))
        column[sources] = torch.arange(len(sources))
        source = column.index_select(0, source)
    order = torch.argsort(source, stable=True)
    return SparseMatrix(
        SparseRows(_offsets(target, shape[0]), source, weight),
        SparseRows(
            _offsets(source, shape[1]), target.index_select(0, order), weight.index_select(0, order)
        ),
    )


def _offsets(rows: Int64[Tensor, " edges"], num_rows: int) -> Int64[Tensor, " num_rows_plus_one"]:
    return functional.pad(torch.bincount(rows, minlength=num_rows).cumsum(0), (1, 0))


class _Propagation(torch.autograd.Function):
    """Horner's scheme over hops; the gradients of a node's many uses meet in one table."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401 - torch's
        user: Float[Tensor, "num_users d"],
        item: Float[Tensor, "num_items d"],
        hops: Sequence[Hop],
        content_index: Int64[Tensor, " content"],
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return H_id of the seed users and of the seed items, and rows of items for content."""
        ctx.hops, ctx.shapes = hops, (len(user), len(item))
        ctx.save_for_backward(content_index)
        x_user, x_item = user, item
        for hop in reversed(hops):
            near_user = hop.to_user.by_rows.product(x_item)
            near_item = hop.to_item.by_rows.product(x_user)
            x_user = near_user.add_(user[: len(near_user)])
            x_item = near_item.add_(item[: len(near_item)])
        layers = len(hops) + 1
        return x_user / layers, x_item / layers, item.index_select(0, content_index)

    @staticmethod
    def backward(
        ctx: Any,  # noqa: ANN401
        user: Tensor,
        item: Tensor,
        content: Tensor,
    ) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of both tables."""
        layers = len(ctx.hops) + 1
        users, items = [user / layers], [item / layers]
        for hop in ctx.hops:
            users.append(hop.to_item.by_columns.product(items[-1]))
            items.append(hop.to_user.by_columns.product(users[-2]))
        num_users, num_items = ctx.shapes
        (content_index,) = ctx.saved_tensors
        total = _sum_of_first_rows(items, num_items)
        total.index_add_(0, content_index, content)
        return _sum_of_first_rows(users, num_users), total, None, None


def _sum_of_first_rows(parts: Sequence[Tensor], num_rows: int) -> Tensor:
    """Add up tables, each of the first rows; the last one has the most."""
    total = functional.pad(parts[-1], (0, 0, 0, num_rows - len(parts[-1])))
    for part in parts[:-1]:
        total[: len(part)] += part
    return total
