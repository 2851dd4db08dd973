"""Seeds a second of the distributed sampler on a synthetic power-law graph.

    python benchmarks/bench_sampler.py --ranks 2

Seeds are the nodes that neighbourhoods are sampled around: three for each training triple. A batch
is complete when its edges, weights and content features are there.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import RESULTS, write_result

from alignrec.data.schema import INTERACTIONS
from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank, new_group, process_group
from alignrec.graph import schema
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import GraphStreams, count_degrees
from alignrec.graph.layout import write_maps, write_partition
from alignrec.graph.loader import TripleLoader, TripleSettings
from alignrec.graph.partition import partitioner
from alignrec.graph.scattering import scatter_edges
from alignrec.graph.similarity import write_similarity
from alignrec.graph.stores import PartitionedGraph
from alignrec.testing.processes import run_ranks


def write_power_law_log(
    path: Path, num_users: int, num_items: int, num_edges: int, rows_per_group: int = 1 << 20
) -> None:
    """Users and items in 64 loose communities; popularity falls with rank ** -0.8."""
    rng = np.random.default_rng(0)

    def draw(count: int, size: int) -> np.ndarray:
        weight = np.arange(1, count + 1) ** -0.8
        ends = np.cumsum(weight / weight.sum())
        return np.searchsorted(ends, rng.random(size) * ends[-1])

    pairs = np.empty(0, dtype=np.int64)
    while len(pairs) < num_edges:
        users, items = draw(num_users, num_edges), draw(num_items, num_edges)
        near = np.minimum(items // 64 * 64 + users % 64, num_items - 1)
        items = np.where(rng.random(num_edges) < 0.7, near, items)
        pairs = np.union1d(pairs, users * num_items + items)
    pairs = np.sort(rng.permutation(pairs)[:num_edges])
    columns = {
        "user_index": pairs // num_items,
        "item_index": pairs % num_items,
        "rating": pa.nulls(num_edges, pa.float32()),
        "timestamp": pa.nulls(num_edges, pa.int64()),
    }
    pq.write_table(pa.table(columns, schema=INTERACTIONS), path, row_group_size=rows_per_group)


def write(folder: Path, work: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Write the partitioned graph and return facts about it."""
    log = work / "train.parquet"
    write_power_law_log(log, options.users, options.items, options.edges)
    rng = np.random.default_rng(1)
    similar = write_similarity(
        rng.integers(options.items, size=(options.items, 10), dtype=np.int32),
        np.ones((options.items, 10), np.float32),
        work / "similar",
        weight="cosine",
        symmetric=True,
    )
    features = rng.normal(size=(options.items, 64)).astype(np.float32)
    degree = count_degrees(log, num_users=options.users, num_items=options.items)
    graph = GraphStreams(log, degree, similar)
    config = GraphConfig(num_partitions=options.partitions, partition_method=options.method)
    started = time.monotonic()
    parts = partitioner(config, graph, work / "restreaming").assign(graph, options.partitions)
    assigned = time.monotonic()
    scattered = scatter_edges(
        graph, parts, work / "edges", num_partitions=options.partitions, rank=Rank()
    )
    for partition in range(options.partitions):
        write_partition(
            folder,
            graph,
            scattered,
            parts,
            partition,
            features=features,
            feature_dtype=features.dtype,
        )
    write_maps(
        folder,
        graph,
        scattered,
        parts,
        num_partitions=options.partitions,
        num_features=64,
        feature_dtype=features.dtype,
    )
    train_items = np.flatnonzero(degree[schema.ITEM]).astype(np.int32)
    np.save(schema.train_items_path(folder), train_items)
    facts = scattered.facts(parts, options.partitions)
    return {
        "edges": graph.num_edges[schema.RATES],
        "partition_seconds": round(assigned - started, 1),
        "write_seconds": round(time.monotonic() - assigned, 1),
        "cut": facts["edge_cut"]["user__rates__item"],
        "balance": facts["balance"],
    }


def measure(folder: Path, options: argparse.Namespace) -> dict[str, float]:
    """Sample some steps on this rank."""
    with process_group() as rank:
        exchange = Exchange(rank, new_group())
        graph = PartitionedGraph.open(folder, rank)
        content = () if options.without_content else (10,)
        settings = TripleSettings((10, 10), content, options.batch * rank.world_size)
        batches = TripleLoader(graph, exchange, settings).epoch(0)
        next(batches)
        seeds = edges = 0
        started, used = time.monotonic(), time.process_time()
        for _ in range(options.steps):
            batch = next(batches)
            seeds += 3 * len(batch[schema.USER].src_index)
            edges += sum(batch[t].edge_index.shape[1] for t in schema.EDGE_TYPES)
        seconds = time.monotonic() - started
        cpu_seconds = time.process_time() - used
        return {"seeds": seeds, "edges": edges, "seconds": seconds, "cpu_seconds": cpu_seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=150_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--edges", type=int, default=6_000_000)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2048, help="triples of a rank in a step")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--method", choices=("metis", "streaming", "hash"), default="hash")
    parser.add_argument("--partitions", type=int, default=2)
    parser.add_argument("--without-content", action="store_true")
    parser.add_argument("--graph", type=Path, help="folder to keep the graph in")
    parser.add_argument("--output", type=Path, help="default: results/sampler_ranks_<n>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as spare, tempfile.TemporaryDirectory() as work:
        folder = options.graph or Path(spare)
        facts = {} if schema.meta_path(folder).exists() else write(folder, Path(work), options)
        ranks = run_ranks(measure, options.ranks, folder, options, timeout_seconds=900)
    slowest = max(rank["seconds"] for rank in ranks)
    result = {
        "graph": facts,
        "seeds_per_second": round(sum(rank["seeds"] for rank in ranks) / slowest),
        "edges_per_second": round(sum(rank["edges"] for rank in ranks) / slowest),
        # What a busy machine would do if it were idle.
        "seeds_per_cpu_second": round(
            sum(rank["seeds"] for rank in ranks) / sum(rank["cpu_seconds"] for rank in ranks)
        ),
    }
    output = options.output or RESULTS / f"sampler_ranks_{options.ranks}.json"
    write_result(output, vars(options), result)


if __name__ == "__main__":
    main()
