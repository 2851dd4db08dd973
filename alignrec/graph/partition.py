"""Which part of the graph each node belongs to (whole graph -> partitions)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from alignrec.errors import UserError
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import GraphStreams
from alignrec.graph.hashing import hash_ids, salt, uniform_below
from alignrec.graph.restreaming import StreamingPartitioner
from alignrec.graph.schema import ITEM, NODE_TYPES, RATES, SIMILAR, USER, NodeType

# METIS numbers nodes and list positions with 32 bits.
_METIS_LIMIT = 2**31 - 1

Assignment = Mapping[NodeType, npt.NDArray[np.int32]]


class Partitioner(Protocol):
    """Puts every node into one of ``num_partitions`` parts, the same way each time.

    Attributes:
        name: as the configuration names it.
    """

    name: ClassVar[str]

    def assign(self, graph: GraphStreams, num_partitions: int) -> Assignment:
        """Return the partition of every node, by node type."""
        ...


def partitioner(config: GraphConfig, graph: GraphStreams, work: Path) -> Partitioner:
    """Return the partitioner that the configuration names; ``auto`` goes by the size.

    Args:
        config: of the graph stage.
        graph: what will be partitioned.
        work: folder that a partitioner may write and clear.
    """
    method = config.partition_method
    with_similar = config.partition_similar_edges
    if method == "auto":
        num_edges = graph.num_edges[RATES] + with_similar * graph.num_edges[SIMILAR]
        method = "metis" if num_edges <= config.metis_edges else "streaming"
    if method == "hash":
        return HashPartitioner(config.seed)
    if method == "streaming":
        return StreamingPartitioner(config.seed, with_similar=with_similar, work=work)
    return MetisPartitioner(config.seed, with_similar=with_similar)


@dataclasses.dataclass(frozen=True)
class HashPartitioner:
    """Scatters nodes evenly by a hash of their id, without looking at edges."""

    name: ClassVar[str] = "hash"
    seed: int

    def assign(self, graph: GraphStreams, num_partitions: int) -> Assignment:
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

    name: ClassVar[str] = "metis"
    seed: int
    with_similar: bool

    def assign(self, graph: GraphStreams, num_partitions: int) -> Assignment:
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
                f"graph.partition_method=streaming."
            )
        _, parts = pymetis.part_graph(
            num_partitions,
            pymetis.CSRAdjacency(adjacency.indptr, adjacency.indices),
            vweights=1 + np.diff(adjacency.indptr),
            options=pymetis.Options(seed=self.seed),
        )
        part = np.asarray(parts, dtype=np.int32)
        return {USER: part[:num_users], ITEM: part[num_users:]}

    def _adjacency(self, graph: GraphStreams) -> sp.csr_matrix:
        """Return the undirected graph over users and, after them, items, without loops."""
        num_users, num_items = graph.num_nodes[USER], graph.num_nodes[ITEM]
        first, second = [], []
        for block in graph.blocks(RATES):
            first.append(block.source)
            second.append(block.target + num_users)
        if self.with_similar:
            for block in graph.blocks(SIMILAR):
                other = block.source != block.target
                first.append(block.source[other].astype(np.int64) + num_users)
                second.append(block.target[other] + num_users)
        rows, columns = np.concatenate(first), np.concatenate(second)
        size = num_users + num_items
        half = sp.csr_matrix((np.ones(len(rows), np.bool_), (rows, columns)), shape=(size, size))
        return (half + half.T).tocsr()
