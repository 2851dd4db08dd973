"""Seeds a second of the distributed sampler on a synthetic power-law graph, on one and two ranks.

    python benchmarks/bench_sampler.py

Seeds are the nodes that neighbourhoods are sampled around: three for each training triple. A batch
is complete when its edges, weights and content features are there. Each rank has one core and the
same number of triples in a step. The first steps of the epoch, in which the caches of other ranks'
rows fill, are not counted; the shares that were found in the caches are in the result, and one case
has caches too small for them.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
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

# Beside a graph that is complete: what it is.
FACTS = "facts.json"


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


@dataclasses.dataclass(frozen=True)
class Case:
    """How the graph is divided, and how much of other ranks' shares a rank may keep."""

    name: str
    method: str
    cache_mib: float


def write(folder: Path, work: Path, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """Write the partitioned graph and return facts about it."""
    work.mkdir()
    log = work.parent / "train.parquet"
    if not log.exists():
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
    config = GraphConfig(num_partitions=options.partitions, partition_method=method)
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


def kept_or_written(
    folder: Path, work: Path, method: str, options: argparse.Namespace
) -> dict[str, Any]:
    """Return facts about the graph in a folder, written now unless it is there complete."""
    path = folder / FACTS
    shape = {name: getattr(options, name) for name in ("users", "items", "edges", "partitions")}
    if not folder.exists():
        facts = {"options": shape, **write(folder, work, method, options)}
        path.write_text(json.dumps(facts), encoding="utf-8")  # last: the graph is complete
        return facts
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if kept.get("options") != shape:
        raise SystemExit(
            f"{folder} holds {kept.get('options', 'an unfinished graph')}, not {shape}: it would "
            f"be measured under a wrong name. Remove it or name another folder (--graphs)."
        )
    return kept


def measure(folder: Path, case: Case, options: argparse.Namespace) -> dict[str, float]:
    """Sample some steps on this rank."""
    with process_group(backend="gloo") as rank:
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[rank.index % len(cores)]})
        exchange = Exchange(rank, new_group())
        graph = PartitionedGraph.open(folder, rank)
        cache_bytes = int(case.cache_mib * 2**20)
        settings = TripleSettings(
            (10, 10),
            () if options.without_content else (10,),
            options.batch * rank.world_size,
            cache_bytes=cache_bytes,
            sample_cache_bytes=cache_bytes,
        )
        loader = TripleLoader(graph, exchange, settings)
        batches = loader.epoch(0)
        for _ in range(options.warm_up):
            next(batches)
        loader.traffic.take()
        exchange.sum(torch.zeros(1))  # all start together
        seeds = edges = 0
        started, used = time.monotonic(), time.process_time()
        for _ in range(options.steps):
            batch = next(batches)
            seeds += 3 * len(batch[schema.USER].src_index)
            edges += sum(batch[t].edge_index.shape[1] for t in schema.EDGE_TYPES)
        seconds = time.monotonic() - started
        cpu_seconds = time.process_time() - used
        counts = {"seeds": seeds, "edges": edges, "seconds": seconds, "cpu_seconds": cpu_seconds}
        return counts | loader.traffic.take()


def summary(runs: list[list[dict[str, float]]]) -> dict[str, Any]:
    """Return medians over repeated runs on the same number of ranks, and the spread."""

    def rates(what: str, per: str) -> list[float]:
        return [sum(r[what] for r in ranks) / max(r[per] for r in ranks) for ranks in runs]

    seeds = rates("seeds", "seconds")
    cpu = [sum(r["seeds"] for r in ranks) / sum(r["cpu_seconds"] for r in ranks) for ranks in runs]
    shares = ("remote_node_share", "sample_hit_rate", "remote_row_share", "cache_hit_rate")
    return {
        "seeds_per_second": round(statistics.median(seeds)),
        "seeds_per_second_from_to": [round(min(seeds)), round(max(seeds))],
        "edges_per_second": round(statistics.median(rates("edges", "seconds"))),
        # What a busy machine would do if it were idle and no rank waited for another.
        "seeds_per_cpu_second": round(statistics.median(cpu)),
        **{name: round(runs[0][0][f"sampling/{name}"], 3) for name in shares},
    }


def compare(folder: Path, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one rank and several in turn, so that a slow minute meets both."""
    runs: dict[int, list[list[dict[str, float]]]] = {1: [], options.ranks: []}
    for _ in range(options.repeats):
        for num_ranks, results in runs.items():
            results.append(
                run_ranks(measure, num_ranks, folder, case, options, timeout_seconds=900)
            )
    result: dict[str, Any] = {
        f"ranks_{num_ranks}": summary(results) for num_ranks, results in runs.items()
    }
    one, all_ranks = result["ranks_1"], result[f"ranks_{options.ranks}"]
    for rate in ("seeds_per_second", "seeds_per_cpu_second"):
        result[f"ratio_of_{rate}"] = round(all_ranks[rate] / one[rate], 2)
    return {"partitions": case.method, "cache_mib": case.cache_mib, **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=150_000)
    parser.add_argument("--items", type=int, default=100_000)
    parser.add_argument("--edges", type=int, default=6_000_000)
    parser.add_argument("--ranks", type=int, default=2, help="compared with one rank")
    parser.add_argument("--partitions", type=int, default=2)
    parser.add_argument("--batch", type=int, default=2048, help="triples of a rank in a step")
    parser.add_argument("--warm-up", type=int, default=15, help="steps before those that count")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--without-content", action="store_true")
    parser.add_argument("--small-cache-mib", type=float, default=4.0)
    parser.add_argument("--graphs", type=Path, help="folder to keep the graphs in")
    parser.add_argument("--output", type=Path, default=RESULTS / "sampler.json")
    options = parser.parse_args()
    cases = (
        Case("hash", "hash", 128),
        Case("streaming", "streaming", 128),
        Case("hash_small_caches", "hash", options.small_cache_mib),
    )
    facts: dict[str, Any] = {}
    results = {}
    with tempfile.TemporaryDirectory() as spare, tempfile.TemporaryDirectory() as work:
        graphs = options.graphs or Path(spare)
        for case in cases:
            folder = graphs / case.method
            if case.method not in facts:
                facts[case.method] = kept_or_written(
                    folder, Path(work) / case.method, case.method, options
                )
            results[case.name] = compare(folder, case, options)
    write_result(options.output, vars(options), {"graphs": facts, **results})


if __name__ == "__main__":
    main()
