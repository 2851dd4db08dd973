"""Speed, memory and recall of the nearest-neighbour search, exact and approximate.

    python benchmarks/bench_knn.py --method exact --items 200000 --dim 768
    python benchmarks/bench_knn.py --method ann --items 1000000 --dim 128

The exact search is timed on some items and multiplied: its work is the same for every item. The
approximate one does the whole catalogue, index included, as the graph stage does. Features are
drawn around random centres in a space of fewer dimensions, with noise in all.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, write_result

from alignrec.distributed.process_group import Rank
from alignrec.graph import STAGE
from alignrec.graph.knn import FeatureRows, nearest_items
from alignrec.graph.searching import Search
from alignrec.telemetry import Telemetry

BLOCK = 8192


def write_features(path: Path, options: argparse.Namespace) -> None:
    rows = np.lib.format.open_memmap(
        path, mode="w+", dtype=np.float32, shape=(options.items, options.dim)
    )
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(options.intrinsic, options.dim)) / options.intrinsic**0.5
    centres = rng.normal(size=(options.centres, options.intrinsic))
    for start in range(0, options.items, BLOCK):
        size = min(BLOCK, options.items - start)
        inner = centres[rng.integers(options.centres, size=size)]
        inner = inner + options.spread * rng.normal(size=inner.shape)
        rows[start : start + size] = inner @ plane + 0.1 * rng.normal(size=(size, options.dim))
    rows.flush()


def exact(features: np.ndarray, options: argparse.Namespace) -> dict[str, Any]:
    reader = FeatureRows(features, torch.device("cpu"))
    started, used = time.monotonic(), time.process_time()
    for queries in torch.arange(options.queries).split(options.block_rows):
        nearest_items(
            reader, queries, k=10, block_columns=options.block_columns, include_self=False
        )
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    return {
        "items_per_second": round(options.queries / seconds, 1),
        "whole_search_seconds": round(seconds * options.items / options.queries, 1),
        "whole_search_cpu_minutes": round(cpu_seconds * options.items / options.queries / 60, 1),
    }


def approximate(features: np.ndarray, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    config = STAGE.load_config({"knn": {"method": "ann", "recall": options.recall}})
    started, used = time.monotonic(), time.process_time()
    with Telemetry(folder / "logs", "graph", enabled=False) as telemetry:
        search = Search(config, features, folder, Rank(), telemetry)
        facts = search.run()
        search.write(folder, facts)
    seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    return {
        "items_per_second": round(options.items / seconds, 1),
        "whole_search_seconds": round(seconds, 1),
        "whole_search_cpu_minutes": round(cpu_seconds / 60, 1),
        **{name: facts[name] for name in ("cells", "probes", "recall", "recall_sample")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("exact", "ann"), default="exact")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--queries", type=int, default=4096, help="items timed by method exact")
    parser.add_argument("--recall", type=float, default=0.95, help="target of method ann")
    parser.add_argument("--intrinsic", type=int, default=32, help="dimensions of the centres")
    parser.add_argument("--centres", type=int, default=2000)
    parser.add_argument("--spread", type=float, default=0.7, help="around a centre")
    parser.add_argument("--block-rows", type=int, default=1024)
    parser.add_argument("--block-columns", type=int, default=8192)
    parser.add_argument("--output", type=Path, help="default: results/knn_<method>.json")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_features(folder / "features.npy", options)
        features = np.load(folder / "features.npy", mmap_mode="r")
        if options.method == "exact":
            measured = exact(features, options)
        else:
            measured = approximate(features, folder, options)
    measured["threads"] = torch.get_num_threads()
    # With the pages of mapped files that this process has touched.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured["peak_memory_gib"] = round(peak / 2**20, 2)
    output = options.output or RESULTS / f"knn_{options.method}.json"
    write_result(output, vars(options), measured)


if __name__ == "__main__":
    main()
