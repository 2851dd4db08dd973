"""Recall and NDCG of the align stage on a public benchmark, over seeds, in both modes.

    python benchmarks/bench_quality.py
    python benchmarks/bench_quality.py --seeds 0 --modes full

Each run is the recipe ``mmrec`` up to the evaluation: settings were chosen on validation, the epoch
is chosen on validation, test numbers are of that epoch. Runs stay in ``--work``, so a killed
benchmark goes on where it was. The data is ml1m-sparse (``ALIGNREC_DATA``).
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from measuring import RESULTS, ROOT, write_result

from alignrec import artifacts

METRICS = ("recall@10", "recall@20", "ndcg@10", "ndcg@20")
MODES = {
    "full": [],
    "sampled": ["align.mode=sampled", "align.num_ranks=2", "align.edge_dropout=0"],
}


def run(mode: str, seed: int, folder: Path, changes: list[str]) -> dict[str, Any]:
    """Train with one seed and return its metrics."""
    settings = [f"align.seed={seed}", *MODES[mode], *changes]
    command = [sys.executable, "-m", "launch", "run", "mmrec", "--until", "evaluation"]
    command += ["--run-dir", str(folder)]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, check=True)
    metrics = json.loads((folder / "evaluation" / "metrics.json").read_text())["alignrec"]
    facts = artifacts.read(folder / "align").facts
    return {
        "seed": seed,
        **{
            split: {name: round(metrics[split][name], 5) for name in METRICS}
            for split in ("valid", "test")
        },
        "best_epoch": facts["best_epoch"],
        "seconds_per_epoch": round(facts["seconds_per_epoch"], 2),
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the means over seeds."""
    return {
        "runs": runs,
        "mean": {
            split: {
                name: round(statistics.mean(found[split][name] for found in runs), 5)
                for name in METRICS
            }
            for split in ("valid", "test")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--sampled-seeds", type=int, nargs="+", help="others in mode sampled, which is slower"
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "bench_quality")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    options = parser.parse_args()
    seeds = {"full": options.seeds, "sampled": options.sampled_seeds or options.seeds}
    found: dict[str, Any] = {
        mode: summary(
            [run(mode, seed, options.work / f"{mode}_{seed}", options.set) for seed in seeds[mode]]
        )
        for mode in options.modes
    }
    common = set(seeds["full"]) & set(seeds["sampled"])
    if len(found) == len(MODES) and common:
        full, sampled = (
            summary([r for r in found[mode]["runs"] if r["seed"] in common])["mean"]["test"][
                "recall@20"
            ]
            for mode in MODES
        )
        found["sampled_over_full_of_the_same_seeds"] = round(sampled / full, 4)
    write_result(options.output, vars(options), found)


if __name__ == "__main__":
    main()
