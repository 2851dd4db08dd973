"""Partition, sample and train on a large synthetic graph, within a memory limit.

    python benchmarks/bench_scale.py

1 M users, 1 M items, 20 M interactions and 64-d content features are drawn by seeded code; then the
graph stage cuts them into partitions on two ranks, and two ranks take steps of sampled training.
An item's nearest items have its taste, of which there are about as many as cells, so the search for
them is an easy one; ``bench_knn.py`` has harder ones. Neither the metrics nor the whole epoch are
looked at: steps are timed, and their loss is told.

Memory is what all processes of a phase have resident together (proportional set size: pages that
they share count once), sampled four times a second; files in the page cache do not count.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from measuring import RESULTS, ROOT, write_result

from alignrec import artifacts
from alignrec.align.config import AlignConfig
from alignrec.align.inputs import Inputs
from alignrec.align.sampled import SampledTrainer
from alignrec.data import schema
from alignrec.distributed.host_memory import freed_memory_kept
from alignrec.distributed.process_group import process_group
from alignrec.testing.processes import run_ranks

BLOCK_USERS = 50_000
TASTES = 2000


class Memory:
    """Largest memory of this process's descendants while the block runs."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.25):
            self.peak_bytes = max(self.peak_bytes, sum(map(pss, psutil.Process().children(True))))


def pss(process: psutil.Process) -> int:
    """Return the proportional set size of a process, 0 when it has ended."""
    try:
        return int(process.memory_full_info().pss)
    except (psutil.Error, OSError):
        return 0


def write_dataset(folder: Path, users: int, items: int, edges: int) -> None:
    """Users with a taste each; seven of ten interactions are within it, popularity is a power."""
    fingerprint = artifacts.fingerprint("benchmark", 1, {"sizes": [users, items, edges]}, {})
    with artifacts.writing(
        folder, kind="dataset", fingerprint=fingerprint, config={}, inputs={}
    ) as draft:
        (draft.path / "interactions").mkdir(exist_ok=True)
        sizes = _write_interactions(draft.path, users, items, edges)
        index = np.arange(users)
        keys = pa.array(index).cast(pa.string())
        pq.write_table(pa.table([index, keys], schema=schema.USERS), draft.path / "users.parquet")
        index = np.arange(items)
        keys = pa.array(index).cast(pa.string())
        empty, no = pa.repeat("", items), pa.repeat(False, items)
        columns = [index, keys, empty, empty, no, no, no]
        pq.write_table(pa.table(columns, schema=schema.ITEMS), draft.path / "items.parquet")
        pq.write_table(schema.SAMPLES.empty_table(), draft.path / "samples.parquet")
        pq.write_table(schema.QUARANTINE.empty_table(), draft.path / "quarantine.parquet")
        draft.counts |= {"num_items": items, "num_users": users, **sizes}


def _write_interactions(folder: Path, users: int, items: int, edges: int) -> dict[str, int]:
    per_user = edges // users
    popularity = np.cumsum(np.arange(1, items + 1) ** -0.8)
    popularity /= popularity[-1]
    shuffled = np.random.default_rng(0).permutation(items)
    writers = {
        split: pq.ParquetWriter(schema.interactions_path(folder, split), schema.INTERACTIONS)
        for split in schema.SPLITS
    }
    sizes = dict.fromkeys(writers, 0)
    for start in range(0, users, BLOCK_USERS):
        rng = np.random.default_rng([1, start])
        block = np.arange(start, min(start + BLOCK_USERS, users))
        user = np.repeat(block, per_user + 2)  # a few pairs occur twice and are then one
        drawn = np.searchsorted(popularity, rng.random(len(user)))
        own = user * 7919 % TASTES
        place = (rng.random(len(user)) ** 2 * (items // TASTES)).astype(np.int64)
        near = np.minimum(place * TASTES + own, items - 1)
        item = shuffled[np.where(rng.random(len(user)) < 0.7, near, drawn)]
        pairs = np.sort(user * items + item)  # np.unique takes five times as long
        pairs = pairs[np.append(True, pairs[1:] != pairs[:-1])]
        user, item = pairs // items, pairs % items
        place = rng.random(len(user))
        for split, low, high in (("train", 0.0, 0.98), ("valid", 0.98, 0.99), ("test", 0.99, 1.0)):
            chosen = (place >= low) & (place < high)
            size = int(chosen.sum())
            rows = [user[chosen], item[chosen], pa.nulls(size, pa.float32()),
                    pa.nulls(size, pa.int64())]  # fmt: skip
            writers[split].write_table(pa.table(rows, schema=schema.INTERACTIONS))
            sizes[split] += size
    for writer in writers.values():
        writer.close()
    return {f"num_{split}": size for split, size in sizes.items()}


def write_features(folder: Path, dataset: Path, items: int, dim: int) -> None:
    """A centre for each taste and noise around it."""
    fingerprint = artifacts.fingerprint("benchmark", 1, {"dim": dim}, {"dataset": str(dataset)})
    with artifacts.writing(
        folder, kind="features", fingerprint=fingerprint, config={}, inputs={"dataset": dataset}
    ) as draft:
        shape = (items, dim)
        table = np.lib.format.open_memmap(
            draft.path / "features.npy", mode="w+", dtype=np.float32, shape=shape
        )
        centres = np.random.default_rng(2).normal(size=(TASTES, dim)).astype(np.float32)
        for start in range(0, items, BLOCK_USERS):
            block = np.arange(start, min(start + BLOCK_USERS, items))
            noise = np.random.default_rng([3, start]).normal(size=(len(block), dim))
            rows = centres[block % TASTES] + noise.astype(np.float32)
            table[block] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        table.flush()
        np.save(draft.path / "mask.npy", np.ones((items, 2), dtype=bool))
        draft.counts |= {"num_items": items, "dim": dim}


def build_graph(root: Path, ranks: int, settings: list[str]) -> dict[str, Any]:
    """Run the graph stage as a command; return its time, memory and facts."""
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    sets = [part for setting in settings for part in ("--set", f"graph.{setting}")]
    command = [
        *start, "-m", "alignrec.graph", "--dataset", str(root / "dataset"), "--features",
        str(root / "features"), "--output", str(root / "graph"), *sets,
    ]  # fmt: skip
    began, used = time.monotonic(), children_seconds()
    with Memory() as memory:
        subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return {
        "seconds": round(time.monotonic() - began, 1),
        "cpu_seconds": round(children_seconds() - used, 1),
        "peak_gib": round(memory.peak_bytes / 2**30, 2),
        "facts": artifacts.read(root / "graph", "graph").facts,
    }


def children_seconds() -> float:
    """Return the CPU time of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def train(root: Path, steps: int, config: AlignConfig) -> dict[str, float]:
    """Take some steps on this rank."""
    kinds = ("dataset", "features", "graph")
    opening = time.monotonic()
    with process_group(backend="gloo") as rank, freed_memory_kept():
        inputs = Inputs.open({kind: root / kind for kind in kinds})
        trainer = SampledTrainer(config, inputs, rank, work=root)
        losses = []
        began, used = time.monotonic(), time.process_time()
        stepping = trainer.steps(0, 0)
        for _ in range(steps):
            losses.append(float(next(stepping)["bpr"]))
        seconds, cpu_seconds = time.monotonic() - began, time.process_time() - used
        stepping.close()
    tenth = max(steps // 10, 1)
    return {
        "opening_seconds": began - opening,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        # Over all ranks' triples, the same on each of them.
        "first_bpr": sum(losses[:tenth]) / tenth,
        "last_bpr": sum(losses[-tenth:]) / tenth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--edges", type=int, default=20_000_000)
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=2048, help="triples a step over all ranks")
    parser.add_argument("--set", action="append", default=[], help="setting of the graph stage")
    parser.add_argument("--folder", type=Path, help="where to keep the artifacts")
    parser.add_argument("--output", type=Path, default=RESULTS / "scale.json")
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as spare:
        root = options.folder or Path(spare)
        root.mkdir(parents=True, exist_ok=True)
        if not (root / "dataset" / artifacts.MANIFEST).exists():
            write_dataset(root / "dataset", options.users, options.items, options.edges)
        if not (root / "features" / artifacts.MANIFEST).exists():
            write_features(root / "features", root / "dataset", options.items, options.features)
        drawing_seconds = round(time.monotonic() - began, 1)
        graph = build_graph(root, options.ranks, options.set)
        config = AlignConfig(mode="sampled", num_ranks=options.ranks, batch_size=options.batch)
        with Memory() as memory:
            ranks = run_ranks(
                train, options.ranks, root, options.steps, config, timeout_seconds=3600
            )
        counts = artifacts.read(root / "dataset").counts
    seconds = max(rank["seconds"] for rank in ranks)
    result = {
        "counts": counts,
        "drawing_seconds": drawing_seconds,
        "graph": graph,
        "train": {
            "steps": options.steps,
            "opening_seconds": round(max(rank["opening_seconds"] for rank in ranks), 1),
            "seconds": round(seconds, 1),
            "cpu_seconds": round(sum(rank["cpu_seconds"] for rank in ranks), 1),
            "triples_per_second": round(options.steps * options.batch / seconds),
            "peak_gib": round(memory.peak_bytes / 2**30, 2),
            "first_bpr": round(ranks[0]["first_bpr"], 4),
            "last_bpr": round(ranks[0]["last_bpr"], 4),
        },
        "peak_gib": max(graph["peak_gib"], round(memory.peak_bytes / 2**30, 2)),
    }
    write_result(options.output, vars(options), result)


if __name__ == "__main__":
    main()
