"""Edges sorted into files, one for each partition, by all ranks together (streams -> layout).

Each rank reads its share of the edges block by block and appends them to files of its own; whoever
writes a partition reads the files of all ranks. Memory is a block of edges and the node maps.
"""

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignrec.data.shared_array import SharedArray, create_array
from alignrec.distributed.process_group import Rank, barrier
from alignrec.graph.buckets import append_by_bucket
from alignrec.graph.edges import EdgeBlock, GraphStreams
from alignrec.graph.schema import EDGE_TYPES, NODE_TYPES, EdgeType

_EDGE = np.dtype([("id", "<i8"), ("source", "<i4"), ("target", "<i4")])
_NO_EDGES = np.empty(0, dtype=_EDGE)

Edges = npt.NDArray[np.void]
Parts = Mapping[str, npt.NDArray[np.int32]]


@dataclasses.dataclass(frozen=True)
class ScatteredEdges:
    """Files of edges by partition.

    Attributes:
        folder: of the files.
        world_size: number of ranks that wrote them.
    """

    folder: Path
    world_size: int

    def read(self, edge_type: EdgeType, partition: int) -> Edges:
        """Return the edges of a partition, sorted by destination and then source."""
        paths = [_path(self.folder, edge_type, partition, rank) for rank in range(self.world_size)]
        edges = np.concatenate([np.fromfile(p, _EDGE) for p in paths if p.exists()] or [_NO_EDGES])
        return edges[np.lexsort((edges["source"], edges["target"]))]

    def edge_map(self, edge_type: EdgeType) -> npt.NDArray[np.int32]:
        """Map the partition of each edge of a type, by edge id, as a private copy."""
        result: npt.NDArray[np.int32] = np.load(self.map_path(edge_type), mmap_mode="c")
        return result

    def map_path(self, edge_type: EdgeType) -> Path:
        """Return the file of ``edge_map``."""
        return self.folder / f"map_{_name(edge_type)}.npy"

    def facts(self, parts: Parts, num_partitions: int) -> dict[str, Any]:
        """Return how even the parts are and how many edges run between them.

        Balance is the largest part over the average one: 1 is even. Cut is the share of edges whose
        ends lie in different parts.
        """
        balance = {
            node_type: _balance(np.bincount(parts[node_type], minlength=num_partitions))
            for node_type in NODE_TYPES
        }
        cut = {}
        edges = np.zeros(num_partitions, dtype=np.int64)
        for edge_type in EDGE_TYPES:
            paths = [self.folder / f"counts_{_name(edge_type)}_{r}.npy" for r in self._ranks]
            counts = np.sum([np.load(path) for path in paths], axis=0)
            balance[_name(edge_type)] = _balance(counts[0])
            edges += counts[0]
            total = int(counts[0].sum())
            cut[_name(edge_type)] = round(int(counts[1].sum()) / total, 4) if total else 0.0
        balance["all_edges"] = _balance(edges)
        return {"balance": balance, "edge_cut": cut}

    @property
    def _ranks(self) -> range:
        return range(self.world_size)


def scatter_edges(
    graph: GraphStreams, parts: Parts, folder: Path, *, num_partitions: int, rank: Rank
) -> ScatteredEdges:
    """Sort every edge into the file of its destination node's partition; collective."""
    scattered = ScatteredEdges(folder, rank.world_size)
    if rank.is_first:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left is not whole
        folder.mkdir(parents=True)
        for edge_type in EDGE_TYPES:
            size = (graph.num_edges[edge_type],)
            create_array(scattered.map_path(edge_type), np.int32, size)
    barrier(rank)
    for edge_type in EDGE_TYPES:
        counts = np.zeros((2, num_partitions), dtype=np.int64)
        with SharedArray.open(scattered.map_path(edge_type)) as edge_map:
            for block in graph.blocks(edge_type, rank):
                ends = parts[edge_type[2]][block.target]
                crossing = parts[edge_type[0]][block.source] != ends
                counts[0] += np.bincount(ends, minlength=num_partitions)
                counts[1] += np.bincount(ends[crossing], minlength=num_partitions)
                edge_map.write(block.first, ends)
                _append(folder, edge_type, block, ends, rank)
        np.save(folder / f"counts_{_name(edge_type)}_{rank.index}.npy", counts)
    barrier(rank)
    return scattered


def _append(
    folder: Path, edge_type: EdgeType, block: EdgeBlock, ends: npt.NDArray[np.int32], rank: Rank
) -> None:
    edges = np.empty(len(block), dtype=_EDGE)
    edges["id"], edges["source"], edges["target"] = block.ids, block.source, block.target
    append_by_bucket(edges, ends, lambda partition: _path(folder, edge_type, partition, rank.index))


def _path(folder: Path, edge_type: EdgeType, partition: int, rank_index: int) -> Path:
    return folder / f"{_name(edge_type)}_{partition}_{rank_index}.bin"


def _name(edge_type: EdgeType) -> str:
    return "__".join(edge_type)


def _balance(counts: npt.NDArray[np.integer]) -> float:
    return round(float(counts.max() / max(counts.mean(), 1e-9)), 4)
