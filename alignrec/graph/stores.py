"""This rank's share of the partitioned graph, behind PyG's store interfaces (disk -> sampler)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float32, Int, Int32, Int64, Shaped
from torch import Tensor
from torch_geometric.data import EdgeAttr, FeatureStore, GraphStore, TensorAttr
from torch_geometric.data.graph_store import EdgeLayout

from alignrec.distributed.exchange import Exchange, gather_rows
from alignrec.distributed.process_group import Rank
from alignrec.graph import layout, schema
from alignrec.graph.caching import RowCache, Traffic
from alignrec.graph.schema import EDGE_TYPES, ITEM, NODE_TYPES, USER, EdgeType, NodeType


@dataclasses.dataclass(frozen=True)
class NeighborLists:
    """In-edges of the nodes that a rank owns, one list per node.

    Attributes:
        indptr: the list of local row r lies at ``indptr[r]`` .. ``indptr[r + 1]``.
        source: global ids of the edges' source nodes, ascending in a list.
        weight: what a message along the edge is multiplied by, from whole-graph degrees.
    """

    indptr: Int64[Tensor, " rows_plus_1"]
    source: Int[Tensor, " num_edges"]
    weight: Float32[Tensor, " num_edges"]


class PartitionedGraph(GraphStore):  # type: ignore[misc]
    """The union of the partitions that one rank owns, and the book of who owns the others.

    Partition p of P belongs to rank ``p * world_size // P``: METIS numbers parts by bisection, so
    neighbouring parts share edges. All edge types' lists lie in one array, so that one pass
    samples them all.

    Attributes:
        num_nodes: node type -> number in the whole graph.
        num_edges: edge type -> number in the whole graph.
        num_features: length of an item's content feature.
        owned: node type -> global ids of this rank's nodes, by local row.
        degree: node type -> whole-graph training degree, by local row.
        neighbors: edge type -> lists of in-edges, by local row of the destination node.
        lists: the lists of all edge types in the order of EDGE_TYPES.
        first_list: edge type -> number of its first list in ``lists``.
        train_items: item_index of the items with a training interaction, ascending.
    """

    def __init__(self, folder: Path, rank: Rank) -> None:
        super().__init__()
        meta = layout.read_meta(folder)
        self._world_size = rank.world_size
        self._num_partitions: int = meta["num_parts"]
        self.num_features: int = meta["num_features"]
        self._feature_dtype = getattr(torch, meta["feature_dtype"])
        self.num_nodes: dict[NodeType, int] = dict(meta["num_nodes"])
        self.num_edges: dict[EdgeType, int] = {
            edge_type: meta["num_edges"]["__".join(edge_type)] for edge_type in EDGE_TYPES
        }
        self._partition_of = {t: layout.load(schema.node_map_path(folder, t)) for t in NODE_TYPES}
        self._rank_of_partition = (
            torch.arange(self._num_partitions) * self._world_size // self._num_partitions
        )
        folders = [
            schema.partition_path(folder, partition)
            for partition in range(self._num_partitions)
            if self._rank_of_partition[partition] == rank.index
        ]
        nodes = [layout.load(path / "node_feats.pt") for path in folders]
        self.owned = {t: _concatenate([n[t]["id"] for n in nodes], torch.int64) for t in NODE_TYPES}
        self.degree = {
            t: _concatenate([n[t]["feats"]["degree"] for n in nodes], torch.int64)
            for t in NODE_TYPES
        }
        self._features = [n[ITEM]["feats"]["x"] for n in nodes]
        self._row_of = {t: _rows(self.owned[t], self.num_nodes[t]) for t in NODE_TYPES}
        self._read_edges(folders)
        self.train_items: Int32[Tensor, " num_train_items"] = torch.from_numpy(
            layout.read_train_items(folder)
        )

    @classmethod
    def open(cls, folder: Path, rank: Rank) -> "PartitionedGraph":
        """Read the partitions of ``rank`` from a graph artifact."""
        return cls(folder, rank)

    def owner_of(self, node_type: NodeType, ids: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the rank that owns each node."""
        partitions = self._partition_of[node_type].index_select(0, ids)
        ranks: Tensor = self._rank_of_partition.index_select(0, partitions.to(torch.int64))
        return ranks

    def local_rows(self, node_type: NodeType, ids: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the local rows of nodes that this rank owns."""
        return self._row_of[node_type].index_select(0, ids).to(torch.int64)

    def features(
        self, rows: Int64[Tensor, " n"], *, out: Shaped[Tensor, "n num_features"] | None = None
    ) -> Shaped[Tensor, "n num_features"]:
        """Return the content features of this rank's items by local row, in the stored precision.

        Features stay in their files, which the operating system caches.

        Args:
            rows: local rows.
            out: where to put them; None makes a new tensor.
        """
        if out is None:
            out = self.empty_features(len(rows))
        if len(self._features) == 1:
            return torch.index_select(self._features[0], 0, rows, out=out)
        first = 0
        for part in self._features:
            inside = ((rows >= first) & (rows < first + len(part))).nonzero()[:, 0]
            out[inside] = part.index_select(0, rows[inside] - first)
            first += len(part)
        return out

    def empty_features(self, count: int) -> Shaped[Tensor, "count num_features"]:
        """Return room for so many content features."""
        return torch.empty((count, self.num_features), dtype=self._feature_dtype)

    def row_cache(self, size_bytes: int) -> RowCache | None:
        """Return a cache for other ranks' content features, None where it would hold no row."""
        num_items = self.num_nodes[ITEM]
        return RowCache.within(
            size_bytes,
            num_nodes=num_items,
            num_rows=num_items - len(self.owned[ITEM]),
            dim=self.num_features,
            dtype=self._feature_dtype,
        )

    def training_edges(self) -> tuple[Int32[Tensor, " n"], Int32[Tensor, " n"]]:
        """Return (user_index, item_index) of the interactions of this rank's users."""
        lists = self.neighbors[schema.REV_RATES]
        users = self.owned[USER].to(torch.int32).repeat_interleave(lists.indptr.diff())
        return users, lists.source

    def _read_edges(self, folders: list[Path]) -> None:
        """Put the edges of all partitions and types into one set of lists."""
        graphs = [layout.load(path / "graph.pt") for path in folders]
        weights = [layout.load(path / "edge_feats.pt") for path in folders]
        lengths, sources, values = [], [], []
        for edge_type in EDGE_TYPES:
            target = edge_type[2]
            num_rows = len(self.owned[target])
            for graph, weight in zip(graphs, weights, strict=True):
                sources.append(graph[edge_type]["row"])
                values.append(weight[edge_type]["feats"]["edge_attr"].squeeze(1))
            length = torch.zeros(num_rows, dtype=torch.int64)
            for graph in graphs:
                rows = self.local_rows(target, graph[edge_type]["col"])
                length += torch.bincount(rows, minlength=num_rows)
            lengths.append(length)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), *lengths]).cumsum(0)
        self.lists = NeighborLists(
            indptr, _concatenate(sources, torch.int32), _concatenate(values, torch.float32)
        )
        self.first_list: dict[EdgeType, int] = {}
        self.neighbors: dict[EdgeType, NeighborLists] = {}
        first = 0
        for edge_type in EDGE_TYPES:
            last = first + len(self.owned[edge_type[2]])
            edges = slice(int(indptr[first]), int(indptr[last]))
            self.first_list[edge_type] = first
            self.neighbors[edge_type] = NeighborLists(
                indptr[first : last + 1] - indptr[first],
                self.lists.source[edges],
                self.lists.weight[edges],
            )
            first = last

    # PyG's interface ----------------------------------------------------------------------------

    def get_all_edge_attrs(self) -> list[EdgeAttr]:
        """Describe the edge types."""
        return [self._attribute(edge_type) for edge_type in EDGE_TYPES]

    def _attribute(self, edge_type: EdgeType) -> EdgeAttr:
        size = (self.num_nodes[edge_type[0]], self.num_nodes[edge_type[2]])
        return EdgeAttr(edge_type=edge_type, layout=EdgeLayout.COO, is_sorted=True, size=size)

    def _get_edge_index(self, edge_attr: EdgeAttr) -> tuple[Tensor, Tensor] | None:
        """Return this rank's edges of a type as global ids (source, destination)."""
        if edge_attr.layout != EdgeLayout.COO:
            return None
        lists = self.neighbors[edge_attr.edge_type]
        targets = self.owned[edge_attr.edge_type[2]].repeat_interleave(lists.indptr.diff())
        return lists.source.to(torch.int64), targets

    def _put_edge_index(self, edge_index: Any, edge_attr: EdgeAttr) -> bool:  # noqa: ANN401, ARG002
        raise RuntimeError("the graph artifact is read-only: run the graph stage to change edges")

    def _remove_edge_index(self, edge_attr: EdgeAttr) -> bool:  # noqa: ARG002
        raise RuntimeError("the graph artifact is read-only: run the graph stage to change edges")


class DistributedFeatures(FeatureStore):  # type: ignore[misc]
    """Node features by global id, wherever they lie: reading is a collective call.

    Features are item ``x`` (content features) and ``degree`` of both node types.

    Attributes:
        joined: which features PyG's loaders attach to every node of a batch.
        traffic: counts what ``content`` reads.
    """

    def __init__(
        self,
        graph: PartitionedGraph,
        exchange: Exchange,
        joined: tuple[tuple[NodeType, str], ...] = ((ITEM, "x"),),
        *,
        cache_bytes: int = 0,
        traffic: Traffic | None = None,
    ) -> None:
        """Open the features.

        Args:
            graph: this rank's share.
            exchange: with the other ranks.
            joined: see above.
            cache_bytes: memory for content features of other ranks' items; 0 keeps none.
            traffic: where to count; None counts in one of its own.
        """
        super().__init__()
        self.__dict__.update(
            _graph=graph,
            _exchange=exchange,
            _cache=graph.row_cache(cache_bytes) if exchange.world_size > 1 else None,
            joined=joined,
            traffic=traffic or Traffic(),
        )

    def get_all_tensor_attrs(self) -> list[TensorAttr]:
        """Describe the joined features."""
        return [TensorAttr(group_name=group, attr_name=name) for group, name in self.joined]

    def _get_tensor(self, attr: TensorAttr) -> Tensor:
        graph: PartitionedGraph = self._graph
        group, name = attr.group_name, attr.attr_name
        if attr.index is None:
            raise ValueError(
                f"{group}.{name} was asked for as a whole, but it is spread over the ranks. Ask "
                f"for some nodes by index."
            )

        def read(ids: Tensor) -> Tensor:
            rows = graph.local_rows(group, ids)
            return graph.features(rows) if name == "x" else graph.degree[group][rows]

        rows = gather_rows(
            self._exchange,
            torch.as_tensor(attr.index),
            lambda ids: graph.owner_of(group, ids),
            read,
        )
        return rows.float() if name == "x" else rows

    def own_first(self, items: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return the order in which ``content`` wants items: this rank's own before others'."""
        own = self._graph.local_rows(ITEM, items) >= 0
        return torch.cat([own.nonzero()[:, 0], (~own).nonzero()[:, 0]])

    def content(self, items: Int64[Tensor, " n"]) -> Float32[Tensor, "n num_features"]:
        """Return the content features of distinct items; collective.

        Rows of other ranks that are in the cache do not travel. Every row is written once, to where
        it is returned: in a batch they are most of what is copied.

        Args:
            items: by global id, in the order of ``own_first``.
        """
        graph: PartitionedGraph = self._graph
        exchange: Exchange = self._exchange
        cache: RowCache | None = self._cache
        rows = graph.local_rows(ITEM, items)
        num_own = int((rows >= 0).sum())
        assert bool((rows[:num_own] >= 0).all()), "items in another order than own_first's"
        foreign = items[num_own:]
        absent = torch.arange(len(foreign))
        if cache is not None:
            absent = (~cache.has(foreign)).nonzero()[:, 0]
        self.traffic.add(
            rows=len(items),
            remote_rows=len(foreign),
            cached_rows=len(foreign) - len(absent),
        )
        asked = foreign[absent]
        question = exchange.ask(asked, graph.owner_of(ITEM, asked))
        result = graph.empty_features(len(items))
        graph.features(rows[:num_own], out=result[:num_own])
        route = question.route()
        arrival = route.begin_reply(graph.features(graph.local_rows(ITEM, route.received)))
        others = result[num_own:]
        if cache is not None:
            cache.read(foreign, out=others)
        arrived = arrival.wait()
        others[route.by_owner(absent)] = arrived
        if cache is not None:
            cache.offer(route.by_owner(asked), arrived)
        return result.float()

    def _get_tensor_size(self, attr: TensorAttr) -> tuple[int, ...]:
        size = (self._graph.num_nodes[attr.group_name],)
        return (*size, self._graph.num_features) if attr.attr_name == "x" else size

    def _put_tensor(self, tensor: Any, attr: TensorAttr) -> bool:  # noqa: ANN401, ARG002
        raise RuntimeError("the graph artifact is read-only: run the graph stage to change nodes")

    def _remove_tensor(self, attr: TensorAttr) -> bool:  # noqa: ARG002
        raise RuntimeError("the graph artifact is read-only: run the graph stage to change nodes")


def _concatenate(parts: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Copy tensors of mapped files into one in memory."""
    return torch.cat([torch.empty(0, dtype=dtype), *(part.to(dtype) for part in parts)])


def _rows(owned: Int64[Tensor, " rows"], num_nodes: int) -> Int32[Tensor, " num_nodes"]:
    rows = torch.full((num_nodes,), -1, dtype=torch.int32)
    rows[owned] = torch.arange(len(owned), dtype=torch.int32)
    return rows
