"""What yesterday's embeddings save, and how items without interactions are ranked.

    python benchmarks/bench_warm_start.py
    python benchmarks/bench_warm_start.py --epochs 3 --seeds 1

* growth: the first day has all but the last tenth of the items and of the users, the second day all
  of them. The second day is trained from nothing and from the first day's embeddings; both courses
  of validation recall are kept, with the epochs until each reaches the first day's recall and 99 %
  of the best that starting from nothing reached.
* cold: a tenth of the items, chosen at random, loses all of its interactions; the users' recall of
  these is measured with each ``cold_items``, among those items alone and among all items, beside
  random rows for them. What it costs the other items is the recall of the ordinary test split.

The data is ml1m-sparse (``ALIGNREC_DATA``), prepared by the recipe ``mmrec``.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import RESULTS, ROOT, write_result
from torch import Tensor

from alignrec import artifacts
from alignrec.align import STAGE
from alignrec.align.validation import SELECTION_METRIC
from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.data.embeddings import read_embeddings
from alignrec.evaluation.metrics import evaluation_users, recall_at_k
from alignrec.evaluation.ranking import rank_all
from alignrec.stage import Context
from alignrec.telemetry import read_history
from alignrec.testing.graphs import write_graph
from alignrec.testing.growth import write_features_part, write_part

K = 20
SHARE = 10  # a tenth is new or cold


def prepared(base: Path, root: Path, **cut: Any) -> dict[str, Path]:  # noqa: ANN401
    """Write dataset, features and graph of a part of the whole data."""
    dataset = write_part(root / "data_prep", base / "data_prep", **cut)
    features = write_features_part(root / "features", base / "features", dataset=dataset)
    graph = write_graph(root / "graph", dataset=dataset, features=features)
    return {"dataset": dataset, "features": features, "graph": graph}


def align(
    folders: Mapping[str, Path], output: Path, settings: Mapping[str, Any]
) -> dict[int, float]:
    """Run the stage; return the validation recall by the number of epochs trained."""
    config = STAGE.load_config(settings)
    logs = output.with_name(output.name + ".logs")
    context = Context(folders, output, STAGE.fingerprint(config, folders), logs)
    STAGE.load_run()(config, context)
    recall = f"valid/{SELECTION_METRIC}"
    rows = [row for row in read_history(output) if recall in row]
    return {int(row["epoch"]) + 1: round(row[recall], 5) for row in rows}


def epochs_until(course: dict[int, float], recall: float) -> int | None:
    """Return the number of epochs after which the recall is reached; 0: before the first step."""
    return next((epochs for epochs, value in course.items() if value >= recall), None)


def growth(base: Path, root: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the courses of the first day, and of the second with and without it."""
    counts = artifacts.read(base / "data_prep").counts
    whole = {"num_items": counts["num_items"], "num_users": counts["num_users"]}
    fewer = {name: count - count // SHARE for name, count in whole.items()}
    first = prepared(base, root / "first", **fewer)
    second = prepared(base, root / "second", **whole)
    days = {"first_day": align(first, root / "first" / "align", settings)}
    days["from_nothing"] = align(second, root / "second" / "align", settings)
    initial = {"initial": {"embeddings": str(root / "first" / "align")}}
    days["from_first_day"] = align(second, root / "second" / "warm", {**settings, **initial})
    goals = {
        "first_day_best": max(days["first_day"].values()),
        "99_percent_of_from_nothing": 0.99 * max(days["from_nothing"].values()),
    }
    until = {
        name: {day: epochs_until(days[day], goal) for day in ("from_nothing", "from_first_day")}
        for name, goal in goals.items()
    }
    best = {day: max(course.values()) for day, course in days.items()}
    return {"best": best, "goals": goals, "epochs_until": until, "courses": days}


def pairs(dataset: Path, num_users: int, num_items: int, items: np.ndarray) -> CSR:
    """Return all interactions with some items, of all splits."""
    read = [schema.read_interactions(dataset, split) for split in schema.SPLITS]
    users, found = (np.concatenate(part) for part in zip(*read, strict=True))
    chosen = np.isin(found, items)
    return CSR.from_pairs(users[chosen], found[chosen], num_users, num_items)


def recall(tables: tuple[Tensor, Tensor], train: CSR, truth: CSR, removed: Tensor) -> float:
    """Return the mean recall of users with training interactions."""
    users = evaluation_users(train, truth)
    best = rank_all(*tables, users=users, seen=train, removed=removed, k=K)
    return round(float(recall_at_k(best, truth.select(users), k=K)), 5)


def cold(base: Path, root: Path, settings: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """Return the recall of items that lost their interactions."""
    dataset = base / "data_prep"
    counts = artifacts.read(dataset).counts
    num_items, num_users = counts["num_items"], counts["num_users"]
    rng = np.random.default_rng(seed)
    chosen = np.sort(rng.choice(num_items, num_items // SHARE, replace=False))
    folders = prepared(base, root, num_items=num_items, num_users=num_users, without=chosen)
    hidden = pairs(dataset, num_users, num_items, chosen)
    users, items = schema.read_interactions(folders["dataset"], "train")
    train = CSR.from_pairs(users, items, num_users, num_items)
    users, items = schema.read_interactions(folders["dataset"], "test")
    test = CSR.from_pairs(users, items, num_users, num_items)
    warm = torch.from_numpy(np.setdiff1d(np.arange(num_items), chosen))
    nobody = torch.empty(0, dtype=torch.int64)
    results = {}
    tables = {}
    for kind in ("similar", "own"):
        output = root / kind
        align(folders, output, {**settings, "cold_items": kind, "seed": seed})
        tables[kind] = read_embeddings(output, num_users=num_users, num_items=num_items)
    user, item = tables["own"][0], tables["own"][1].clone()
    rows = torch.from_numpy(chosen)
    noise = torch.randn(len(rows), item.shape[1], generator=torch.Generator().manual_seed(seed))
    item[rows] = noise * item[warm].std()
    for kind, pair in {**tables, "random_rows": (user, item)}.items():
        results[kind] = {
            "among_cold": recall(pair, train, hidden, warm),
            "among_all": recall(pair, train, hidden, nobody),
            "test": recall(pair, train, test, nobody),
        }
    return results


def main() -> int:
    """Run the benchmark and write its result file."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--patience", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=0.003)
    parser.add_argument("--seeds", type=int, default=1, help="choices of cold items")
    parser.add_argument("--run-dir", type=Path, help="run of the recipe mmrec; default: a new one")
    parser.add_argument(
        "--parts", nargs="+", choices=["growth", "cold"], default=["growth", "cold"]
    )
    parser.add_argument("--result", type=Path, default=RESULTS / "warm_start.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    settings = {
        "epochs": options.epochs,
        "patience": options.patience,
        "learning_rate": options.learning_rate,
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        base = options.run_dir or root / "base"
        if options.run_dir is None:
            words = ["-m", "launch", "run", "mmrec", "--until", "graph", "--run-dir", str(base)]
            subprocess.run([sys.executable, *words], cwd=ROOT, check=True)
        result: dict[str, Any] = {}
        if "growth" in options.parts:
            result["growth"] = growth(base, root / "growth", settings)
        if "cold" in options.parts:
            for seed in range(options.seeds):
                result[f"cold_{seed}"] = cold(base, root / f"cold_{seed}", settings, seed)
        write_result(options.result, vars(options), result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
