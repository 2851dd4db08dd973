"""The whole heterogeneous graph in memory while it is being built (dataset, kNN -> partitions)."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType, NodeType

Integers = npt.NDArray[np.integer]


@dataclasses.dataclass(frozen=True)
class EdgeList:
    """All edges of one type; the position in the list is the edge's id.

    Attributes:
        source: ids of source nodes, shape (num_edges,).
        target: ids of destination nodes, shape (num_edges,).
        weight: float32 (num_edges,), what a message along the edge is multiplied by.
    """

    source: Integers
    target: Integers
    weight: npt.NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.source)


@dataclasses.dataclass(frozen=True)
class WholeGraph:
    """Nodes, their training degrees and all edges.

    Attributes:
        degree: node type -> number of training interactions of each node, int64.
        edges: edge type -> edges; edge e of ``rev_rates`` is edge e of ``rates`` turned round.
    """

    degree: Mapping[NodeType, npt.NDArray[np.int64]]
    edges: Mapping[EdgeType, EdgeList]

    @property
    def num_nodes(self) -> dict[NodeType, int]:
        """Number of nodes by type."""
        return {node_type: len(degree) for node_type, degree in self.degree.items()}


def whole_graph(
    users: Integers, items: Integers, *, num_users: int, num_items: int, similar: sp.csr_matrix
) -> WholeGraph:
    """Put training interactions and item-item neighbours together.

    Args:
        users: user_index of each training interaction.
        items: item_index of each training interaction.
        num_users: number of users, with or without interactions.
        num_items: number of items.
        similar: (num_items, num_items); row i holds the weights of what flows into item i.
    """
    degree = {
        USER: np.bincount(users, minlength=num_users),
        ITEM: np.bincount(items, minlength=num_items),
    }
    product = degree[USER][users].astype(np.float64) * degree[ITEM][items]
    weight = (1.0 / np.sqrt(product)).astype(np.float32)
    target = np.repeat(np.arange(num_items, dtype=np.int64), np.diff(similar.indptr))
    edges = {
        RATES: EdgeList(users, items, weight),
        REV_RATES: EdgeList(items, users, weight),
        SIMILAR: EdgeList(similar.indices.astype(np.int64), target, similar.data),
    }
    return WholeGraph(degree, edges)
