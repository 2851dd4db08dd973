"""Cleaning, k-core, split and index of a large log: time and memory of all processes together.

python benchmarks/bench_interactions.py
python benchmarks/bench_interactions.py --rows 1000000 --items 20000 --users 30000 --output x.json

The same steps are done by alignrec and, where the log fits into memory, by plain pandas; both must
leave the same interactions. Drawing the log is not timed.
"""

import argparse
import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from measuring import ROOT, Family

RESULT = ROOT / "benchmarks" / "results" / "interactions.json"
_CHUNK_ROWS = 1_000_000
_SAMPLE_SECONDS = 0.25
_SECONDS_OF_LOG = 2 * 365 * 86_400
_WAYS = ("alignrec", "pandas")


def main() -> None:
    options = parse_options()
    if options.way:
        print(json.dumps(WORK[options.way](options, Path(options.folder))))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-interactions-", dir=options.folder))
    try:
        draw(options, folder)
        runs: dict[str, list[dict[str, Any]]] = {way: [] for way in _WAYS}
        for _ in range(options.repeats):
            for way in _WAYS if options.pandas else _WAYS[:1]:
                runs[way].append(measure(way, folder))
                print(f"{way}: {json.dumps(runs[way][-1])}", flush=True)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report(options, folder, runs), indent=1) + "\n")
    finally:
        shutil.rmtree(folder)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=25_000_000)
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--users", type=int, default=450_000)
    parser.add_argument("--core", type=int, default=5)
    parser.add_argument("--cpus", type=int, default=os.cpu_count())
    parser.add_argument("--rows-per-task", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument(
        "--pandas", action=argparse.BooleanOptionalAction, default=True, help="the comparison"
    )
    parser.add_argument("--folder", help="where the log and the results lie for the time of it")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--way", choices=_WAYS, help=argparse.SUPPRESS)
    return parser.parse_args()


def draw(options: argparse.Namespace, folder: Path) -> None:
    """Draw the log: items by Zipf's law, users by a log-normal law of activity; no order."""
    rng = np.random.default_rng(0)
    of_item = np.cumsum(1 / (np.arange(options.items) + 10.0))
    of_user = np.cumsum(rng.lognormal(0, 1, options.users))
    item_names, user_names = rng.permutation(options.items), rng.permutation(options.users)
    keys = {"item_id": key("B", np.arange(options.items))}
    pq.write_table(pa.table(keys), folder / "items.parquet")
    writer = None
    for start in range(0, options.rows, _CHUNK_ROWS):
        count = min(_CHUNK_ROWS, options.rows - start)
        item, user = (
            np.minimum(np.searchsorted(law, rng.random(count) * law[-1]), len(law) - 1)
            for law in (of_item, of_user)
        )
        table = pa.table(
            {
                "user_id": key("A", user_names[user]),
                "item_id": key("B", item_names[item]),
                "rating": rng.choice(5, count, p=(0.05, 0.05, 0.1, 0.25, 0.55)) + 1.0,
                "timestamp": rng.integers(1_600_000_000, 1_600_000_000 + _SECONDS_OF_LOG, count),
            }
        )
        writer = writer or pq.ParquetWriter(folder / "log.parquet", table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()
    settings = {name: vars(options)[name] for name in ("core", "cpus", "rows_per_task")}
    (folder / "settings.json").write_text(json.dumps(settings))


def key(letter: str, numbers: npt.NDArray[np.int64]) -> pa.Array:
    """Return keys such as B00000001."""
    digits = pc.utf8_lpad(pa.array(numbers).cast(pa.string()), 8, "0")
    return pc.binary_join_element_wise(letter, digits, "")


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Run one way in a process of its own and watch that process and all below it."""
    command = [sys.executable, __file__, "--way", way, "--folder", str(folder)]
    started = time.monotonic()
    family = Family()
    with (folder / f"{way}.out").open("w+") as out:
        process = subprocess.Popen(command, cwd=ROOT, stdout=out, env=environment(family))
        peak, cpu_seconds = watch(process, family)
        seconds = time.monotonic() - started
        out.seek(0)
        lines = out.read().splitlines()
    family.end()
    if process.returncode != 0 or not lines:
        return {"failed_with": process.returncode, "peak_gib": round(peak / 2**30, 2)}
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_gib": round(peak / 2**30, 2),
        **json.loads(lines[-1]),
    }


def environment(family: Family) -> dict[str, str]:
    inherited = family.environment()
    inherited.pop("RAY_ADDRESS", None)
    return {**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def watch(process: "subprocess.Popen[Any]", family: Family) -> tuple[int, float]:
    """Return peak of the memory of all processes together, and their CPU seconds.

    The memory is the sum of proportional set sizes, so shared pages count once; mapped files count.
    """
    peak, cpu_seconds = 0, 0.0
    while process.poll() is None:
        total = 0
        for member in family.members():
            with contextlib.suppress(psutil.Error):
                total += member.memory_full_info().pss
        peak = max(peak, total)
        cpu_seconds = family.poll()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_SAMPLE_SECONDS)
    return peak, cpu_seconds


def by_alignrec(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from alignrec.telemetry import Telemetry
    from data_prep import interactions, locations
    from data_prep.config import (
        DataPrepConfig,
        InteractionColumns,
        InteractionsConfig,
        ItemsConfig,
    )
    from data_prep.quarantine import Quarantine

    given = json.loads((folder / "settings.json").read_text())
    log = str(folder / "log.parquet")
    config = DataPrepConfig(
        items=ItemsConfig(path=str(folder / "items.parquet")),
        interactions=InteractionsConfig(
            path=log,
            columns=InteractionColumns(rating="rating", timestamp="timestamp"),
            min_user_interactions=given["core"],
            min_item_interactions=given["core"],
            rows_per_task=given["rows_per_task"],
        ),
        num_cpus=given["cpus"],
    )
    output = folder / "alignrec"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    with Telemetry(output / "logs", "data_prep") as telemetry:
        cleaned = interactions.clean(
            locations.find([log]),
            config,
            pq.read_table(folder / "items.parquet")["item_id"].combine_chunks(),
            quarantine=Quarantine(),
            work=output / "work",
            telemetry=telemetry,
        )
        kept = cleaned.interacted
        written = interactions.write(
            cleaned,
            item_index=np.where(kept, np.cumsum(kept) - 1, -1),
            folder=output,
            telemetry=telemetry,
        )
    rounds = written.facts["core_rounds"]
    return {
        "counts": {**written.counts, "num_items": int(kept.sum())},
        "buckets": cleaned.plan.buckets.log.num_buckets,
        "work_gib": round(sum(f.stat().st_size for f in output.rglob("*.*")) / 2**30, 2),
        # The log, the buckets, the item column in each round, the buckets twice for the files.
        "passes": {"log": 1, "buckets": 1, "item_column": rounds, "split": 1, "files": 1},
    }


def by_pandas(_: argparse.Namespace, folder: Path) -> dict[str, Any]:
    import pandas as pd

    given = json.loads((folder / "settings.json").read_text())
    items = pd.read_parquet(folder / "items.parquet")["item_id"]
    log = pd.read_parquet(folder / "log.parquet")
    log = log[log["item_id"].isin(items)]
    log["user"], users = pd.factorize(log["user_id"])
    log["item"] = pd.Index(items).get_indexer(log["item_id"])
    log = log.drop(columns=["user_id", "item_id"])
    log = log.sort_values("timestamp", kind="stable").drop_duplicates(["user", "item"], keep="last")
    while True:
        enough = (log.groupby("user")["item"].transform("size") >= given["core"]) & (
            log.groupby("item")["user"].transform("size") >= given["core"]
        )
        if enough.all():
            break
        log = log[enough]
    for name in ("user", "item"):
        present = np.sort(log[name].unique())
        log[f"{name}_index"] = np.searchsorted(present, log[name])
        if name == "user":
            users = users[present]
    log["priority"] = np.random.default_rng(0).random(len(log))
    log = log.sort_values(["user_index", "priority"])
    num = log.groupby("user_index")["priority"].transform("size").to_numpy()
    from_end = num - log.groupby("user_index").cumcount().to_numpy()
    both = np.floor(0.2 * num + 1e-9).astype(np.int64)
    few = num < 10
    test = np.where(few, 1, both - both // 2)
    both = np.where(few, 2, both)
    label = np.where(from_end <= test, 2, np.where(from_end <= both, 1, 0))
    output = folder / "pandas"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    log = log[["user_index", "item_index", "rating", "timestamp"]].assign(label=label)
    log = log.sort_values(["user_index", "item_index"])
    counts = {}
    for number, split in enumerate(("train", "valid", "test")):
        part = log[log["label"] == number].drop(columns="label")
        part.to_parquet(output / f"{split}.parquet", index=False)
        counts[f"num_{split}"] = len(part)
    pd.DataFrame({"user_key": users}).to_parquet(output / "users.parquet")
    num_items = int(log["item_index"].max()) + 1
    return {"counts": {"num_users": len(users), **counts, "num_items": num_items}}


WORK = {"alignrec": by_alignrec, "pandas": by_pandas}


def report(
    options: argparse.Namespace, folder: Path, runs: dict[str, list[dict[str, Any]]]
) -> dict[str, Any]:
    """Check that all runs left the same, and put them together with what they ran on."""
    found = {json.dumps(run["counts"], sort_keys=True) for each in runs.values() for run in each
             if "counts" in run}  # fmt: skip
    if len(found) != 1:
        raise SystemExit(f"the ways disagree, or none ended: {found}")
    import pandas
    import ray

    return {
        "command": " ".join(["python", *sys.argv]),
        "log": {
            "rows": options.rows, "items": options.items, "users": options.users,
            "parquet_gib": round((folder / "log.parquet").stat().st_size / 2**30, 2),
        },
        "core": options.core,
        "cpus": options.cpus,
        "rows_per_task": options.rows_per_task,
        "runs": {way: each for way, each in runs.items() if each},
        "versions": {
            "python": platform.python_version(), "numpy": np.__version__, "pyarrow": pa.__version__,
            "ray": ray.__version__, "pandas": pandas.__version__,
        },
        "load_average": os.getloadavg()[0],
    }  # fmt: skip


if __name__ == "__main__":
    main()
