"""Which part of the graph each node belongs to (whole graph -> partitions)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from alignrec.errors import UserError
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import WholeGraph
from alignrec.graph.hashing import hash_ids, salt, uniform_below
from alignrec.graph.schema import ITEM, NODE_TYPES, RATES, SIMILAR, USER, NodeType

# METIS numbers nodes and list positions with 32 bits.
_METIS_LIMIT = 2**31 - 1

Assignment = Mapping[NodeType, npt.NDArray[np.int32]]


class Partitioner(Protocol):
    """Puts every node into one of ``num_partitions`` parts, the same way each time."""

    def assign(self, graph: WholeGraph, num_partitions: int) -> Assignment:
        """Return the partition of every node, by node type."""
        ...


def partitioner(config: GraphConfig) -> Partitioner:
    """Return the partitioner that the configuration names."""
    if config.partition_method == "hash":
        return HashPartitioner(config.seed)
    return MetisPartitioner(config.seed, with_similar=config.partition_similar_edges)


@dataclasses.dataclass(frozen=True)
class HashPartitioner:
    """Scatters nodes evenly by a hash of their id, without looking at edges."""

    seed: int

    def assign(self, graph: WholeGraph, num_partitions: int) -> Assignment:
        """Return the partition of every node, by node type."""
        result = {}
        for kind, node_type in enumerate(NODE_TYPES):
            ids = torch.arange(graph.num_nodes[node_type])
            hashes = hash_ids(ids, salt(self.seed, kind))
            result[node_type] = uniform_below(hashes, num_partitions).numpy().astype(np.int32)
        return result


@dataclasses.dataclass(frozen=True)
class MetisPartitioner:
    """Cuts few edges and balances 1 + number of in-edges of the nodes, by METIS k-way.

    Attributes:
        seed: of METIS; the same seed and graph give the same parts.
        with_similar: whether item-item edges count as well as interactions.
    """

    seed: int
    with_similar: bool

    def assign(self, graph: WholeGraph, num_partitions: int) -> Assignment:
        """Return the partition of every node, by node type.

        Raises:
            UserError: the graph has more nodes or edges than METIS can number.
        """
        num_users = graph.num_nodes[USER]
        if num_partitions == 1:
            return {t: np.zeros(n, np.int32) for t, n in graph.num_nodes.items()}
        import pymetis

        adjacency = self._adjacency(graph)
        if adjacency.nnz > _METIS_LIMIT:
            raise UserError(
                f"{adjacency.nnz} edge ends are more than METIS can number (2**31 - 1). Set "
                f"graph.partition_method=hash."
            )
        _, parts = pymetis.part_graph(
            num_partitions,
            pymetis.CSRAdjacency(adjacency.indptr, adjacency.indices),
            vweights=1 + np.diff(adjacency.indptr),
            options=pymetis.Options(seed=self.seed),
        )
        part = np.asarray(parts, dtype=np.int32)
        return {USER: part[:num_users], ITEM: part[num_users:]}

    def _adjacency(self, graph: WholeGraph) -> sp.csr_matrix:
        """Return the undirected graph over users and, after them, items, without loops."""
        num_users, num_items = graph.num_nodes[USER], graph.num_nodes[ITEM]
        rates = graph.edges[RATES]
        first, second = [rates.source], [rates.target + num_users]
        if self.with_similar:
            similar = graph.edges[SIMILAR]
            other = similar.source != similar.target
            first.append(similar.source[other] + num_users)
            second.append(similar.target[other] + num_users)
        rows, columns = np.concatenate(first), np.concatenate(second)
        size = num_users + num_items
        half = sp.csr_matrix((np.ones(len(rows), np.bool_), (rows, columns)), shape=(size, size))
        return (half + half.T).tocsr()


def partition_facts(graph: WholeGraph, parts: Assignment, num_partitions: int) -> dict[str, Any]:
    """Return how even the parts are and how many edges run between them.

    Balance is the largest part over the average one: 1 is even. Cut is the share of edges whose
    ends lie in different parts.
    """
    balance = {
        node_type: _balance(np.bincount(part, minlength=num_partitions))
        for node_type, part in parts.items()
    }
    cut = {}
    for edge_type, edges in graph.edges.items():
        source, _, target = edge_type
        ends = parts[target][edges.target]
        balance["__".join(edge_type)] = _balance(np.bincount(ends, minlength=num_partitions))
        crossing = parts[source][edges.source] != ends
        cut["__".join(edge_type)] = round(float(crossing.mean()), 4) if len(edges) else 0.0
    return {"balance": balance, "edge_cut": cut}


def _balance(counts: npt.NDArray[np.integer]) -> float:
    return round(float(counts.max() / max(counts.mean(), 1e-9)), 4)
