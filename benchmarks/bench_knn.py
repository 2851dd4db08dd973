"""Speed and memory of the exact nearest-neighbour search.

python benchmarks/bench_knn.py --items 20000 --dim 768
"""

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from alignrec.graph.knn import FeatureRows, nearest_items


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument(
        "--queries", type=int, default=4096, help="items that neighbours are found of"
    )
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--block-rows", type=int, default=1024)
    parser.add_argument("--block-columns", type=int, default=8192)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "features.npy"
        rows = np.lib.format.open_memmap(
            path, mode="w+", dtype=np.float32, shape=(options.items, options.dim)
        )
        rng = np.random.default_rng(0)
        for start in range(0, options.items, 8192):
            rows[start : start + 8192] = rng.normal(size=rows[start : start + 8192].shape)
        rows.flush()
        reader = FeatureRows(np.load(path, mmap_mode="r"), torch.device("cpu"))
        started, used = time.monotonic(), time.process_time()
        for start in range(0, options.queries, options.block_rows):
            nearest_items(
                reader,
                start=start,
                stop=min(start + options.block_rows, options.queries),
                k=10,
                block_columns=options.block_columns,
                include_self=False,
            )
        seconds, cpu_seconds = time.monotonic() - started, time.process_time() - used
    result = {
        "options": vars(options),
        "threads": torch.get_num_threads(),
        "items_per_second": round(options.queries / seconds, 1),
        "items_per_cpu_second": round(options.queries / cpu_seconds, 1),
        "whole_search_cpu_minutes": round(cpu_seconds * options.items / options.queries / 60, 1),
        # With the pages of the mapped features that this process has touched.
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
