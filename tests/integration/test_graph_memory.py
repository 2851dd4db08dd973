"""Partitions are built in memory for one of them and for nodes, whatever the number of edges."""

import tracemalloc
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.data.schema import INTERACTIONS
from alignrec.distributed.process_group import Rank
from alignrec.graph import layout
from alignrec.graph.edges import GraphStreams, count_degrees
from alignrec.graph.restreaming import StreamingPartitioner
from alignrec.graph.scattering import scatter_edges
from alignrec.graph.similarity import write_similarity
from alignrec.testing.processes import run_ranks

NUM_USERS, NUM_ITEMS, DIM = 20_000, 10_000, 4


def write_interactions(path: Path, num_edges: int) -> None:
    """Write sorted distinct interactions, a row group at a time."""
    rng = np.random.default_rng(0)
    per_user = num_edges // NUM_USERS
    with pq.ParquetWriter(path, INTERACTIONS) as writer:
        for first in range(0, NUM_USERS, 500):
            users = np.repeat(np.arange(first, first + 500), per_user)
            step = NUM_ITEMS // per_user
            items = np.tile(np.arange(per_user) * step, 500) + rng.integers(step, size=len(users))
            columns = {
                "user_index": users,
                "item_index": items,
                "rating": pa.nulls(len(users), pa.float32()),
                "timestamp": pa.nulls(len(users), pa.int64()),
            }
            writer.write_table(pa.table(columns, schema=INTERACTIONS))


def peak_bytes(folder: Path, num_edges: int, num_partitions: int) -> int:
    """Return the most memory that NumPy and Arrow held while partitions were built.

    Arrow's figure is of the whole process, so this must run in one that has done nothing else.
    """
    path = folder / "train.parquet"
    assert pq.read_metadata(path).num_rows == num_edges
    assert pa.default_memory_pool().max_memory() < 1e6
    features = np.zeros((NUM_ITEMS, DIM), dtype=np.float32)
    chosen = np.random.default_rng(1).integers(NUM_ITEMS, size=(NUM_ITEMS, 5), dtype=np.int32)
    tracemalloc.start()
    similar = write_similarity(
        chosen,
        np.ones(chosen.shape, np.float32),
        folder / "similar",
        weight="cosine",
        symmetric=True,
    )
    degree = count_degrees(path, num_users=NUM_USERS, num_items=NUM_ITEMS)
    graph = GraphStreams(path, degree, similar)
    partitioner = StreamingPartitioner(0, with_similar=True, work=folder / "restreaming")
    parts = partitioner.assign(graph, num_partitions)
    scattered = scatter_edges(
        graph, parts, folder / "edges", num_partitions=num_partitions, rank=Rank()
    )
    for partition in range(num_partitions):
        layout.write_partition(
            folder / "graph",
            graph,
            scattered,
            parts,
            partition,
            features=features,
            feature_dtype=features.dtype,
        )
    layout.write_maps(
        folder / "graph",
        graph,
        scattered,
        parts,
        num_partitions=num_partitions,
        num_features=DIM,
        feature_dtype=features.dtype,
    )
    return tracemalloc.get_traced_memory()[1] + pa.default_memory_pool().max_memory()


@pytest.mark.integration
def test_four_times_the_edges_in_the_same_memory(tmp_path: Path) -> None:
    peaks = []
    for num_edges, num_partitions in ((500_000, 8), (2_000_000, 32)):
        folder = tmp_path / str(num_edges)
        folder.mkdir()
        write_interactions(folder / "train.parquet", num_edges)
        (peak,) = run_ranks(peak_bytes, 1, folder, num_edges, num_partitions)
        peaks.append(peak)
    print(peaks)
    # Ids and weights of all edges of all types would be 80 MB.
    assert peaks[1] < 40e6
    assert peaks[1] < 1.25 * peaks[0]
