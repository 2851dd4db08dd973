"""Partitions on disk, in the layout of torch_geometric.distributed.Partitioner (graph -> stores).

Every node lies in one partition and every edge in the partition of its destination node. PyG's
``LocalGraphStore.from_partition`` and ``LocalFeatureStore.from_partition`` read the folder. As in
PyG, ``edge_id`` in graph.pt and ``global_id`` in node_feats.pt count over all types, ``id`` and
the edges' ``global_id`` within their type.
"""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alignrec import artifacts
from alignrec.errors import UserError
from alignrec.graph import schema
from alignrec.graph.edges import GraphStreams
from alignrec.graph.partition import Assignment
from alignrec.graph.scattering import Edges, ScatteredEdges
from alignrec.graph.schema import EDGE_TYPES, ITEM, NODE_TYPES, EdgeType, NodeType


def write_partition(
    folder: Path,
    graph: GraphStreams,
    scattered: ScatteredEdges,
    parts: Assignment,
    partition: int,
    *,
    features: npt.NDArray[np.floating],
    feature_dtype: np.dtype[Any],
) -> None:
    """Write the edges and features of one partition; what is there already is whole, and stays.

    Args:
        folder: root of the layout.
        graph: degrees and weights.
        scattered: edges by partition.
        parts: partition of every node.
        partition: which one, possibly empty.
        features: (num_items, dim) content features; may be memory-mapped.
        feature_dtype: what they are stored as.
    """
    final = schema.partition_path(folder, partition)
    if final.exists():
        return
    path = final.with_name(f"{final.name}.writing")
    node_offset = _offsets([graph.num_nodes[node_type] for node_type in NODE_TYPES])
    edge_offset = _offsets([graph.num_edges[edge_type] for edge_type in EDGE_TYPES])
    nodes: dict[NodeType, dict[str, Any]] = {}
    for node_type, offset in zip(NODE_TYPES, node_offset, strict=True):
        ids = np.flatnonzero(parts[node_type] == partition)
        nodes[node_type] = {
            "global_id": torch.from_numpy(ids + offset),
            "id": torch.from_numpy(ids),
            "feats": {"degree": torch.from_numpy(graph.degree[node_type][ids])},
        }
        if node_type == ITEM:
            rows = _as_dtype(np.ascontiguousarray(features[ids]), feature_dtype)
            nodes[node_type]["feats"]["x"] = torch.from_numpy(rows)
    _save(path / "node_feats.pt", nodes)
    del nodes
    tables, weights = {}, {}
    for edge_type, offset in zip(EDGE_TYPES, edge_offset, strict=True):
        edges = scattered.read(edge_type, partition)
        tables[edge_type], weights[edge_type] = _edge_tables(graph, edge_type, edges, offset)
    _save(path / "graph.pt", tables)
    _save(path / "edge_feats.pt", weights)
    path.rename(final)


def write_maps(
    folder: Path,
    graph: GraphStreams,
    scattered: ScatteredEdges,
    parts: Assignment,
    *,
    num_partitions: int,
    num_features: int,
    feature_dtype: np.dtype[Any],
) -> None:
    """Write node and edge maps, and META.json last."""
    for edge_type in EDGE_TYPES:
        edge_map = torch.from_numpy(np.asarray(scattered.edge_map(edge_type)))
        _save(schema.edge_map_path(folder, edge_type), edge_map)
    for node_type in NODE_TYPES:
        _save(schema.node_map_path(folder, node_type), torch.from_numpy(parts[node_type]))
    artifacts.write_json(
        schema.meta_path(folder),
        {
            "num_parts": num_partitions,
            "node_types": list(NODE_TYPES),
            "edge_types": [list(edge_type) for edge_type in EDGE_TYPES],
            "node_offset": _offsets([graph.num_nodes[node_type] for node_type in NODE_TYPES]),
            "is_hetero": True,
            "is_sorted": True,
            "num_features": num_features,
            "feature_dtype": feature_dtype.name,
            "num_nodes": dict(graph.num_nodes),
            "num_edges": {"__".join(t): size for t, size in graph.num_edges.items()},
        },
    )


def read_meta(folder: Path) -> dict[str, Any]:
    """Return META.json.

    Raises:
        UserError: it is missing or not JSON.
    """
    path = schema.meta_path(folder)
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    return content


def load(path: Path) -> Any:  # noqa: ANN401 - tensors, or dictionaries of them
    """Read tensors without running pickled code; they stay on disk until they are touched.

    Raises:
        UserError: the file is missing or damaged.
    """
    try:
        return torch.load(path, weights_only=True, mmap=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise _unreadable(path, error) from error


def read_train_items(folder: Path) -> npt.NDArray[np.int32]:
    """Return the items with a training interaction, ascending.

    Raises:
        UserError: the file is missing or damaged.
    """
    path = schema.train_items_path(folder)
    try:
        items: npt.NDArray[np.int32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _unreadable(path, error) from error
    return items


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{path} cannot be read ({reason}), so the graph is not whole. Run the graph stage again."
    )


def _as_dtype(rows: npt.NDArray[np.floating], dtype: np.dtype[Any]) -> npt.NDArray[np.floating]:
    """Convert features; what float16 cannot hold becomes its largest number, not infinity."""
    if rows.dtype == dtype:
        return rows
    limit = np.finfo(dtype).max
    return rows.clip(-limit, limit).astype(dtype)


def _edge_tables(
    graph: GraphStreams, edge_type: EdgeType, edges: Edges, offset: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    ids, source = edges["id"].copy(), edges["source"].astype(np.int64)
    target = edges["target"].astype(np.int64)
    weight = graph.weights(edge_type, ids, source, target)
    table = {
        "edge_id": torch.from_numpy(ids + offset),
        "row": torch.from_numpy(source),
        "col": torch.from_numpy(target),
        "size": (graph.num_nodes[edge_type[0]], graph.num_nodes[edge_type[2]]),
    }
    features = {
        "global_id": torch.from_numpy(ids),
        "feats": {"edge_attr": torch.from_numpy(weight).unsqueeze(1)},
    }
    return table, features


def _offsets(sizes: list[int]) -> list[int]:
    return [0, *np.cumsum(sizes)[:-1].tolist()]


def _save(path: Path, content: Any) -> None:  # noqa: ANN401 - what torch.save takes
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
