"""From a raw catalogue to ranked lists through a local Ray, as ``make demo`` does, but small."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from alignrec import artifacts
from alignrec.data.schema import read_items

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
FIRST = ["data_prep", "pretrain", "features", "graph"]
LAST = ["align", "ablation", "evaluation", "export"]
STAGES = FIRST + LAST
RECIPE = """
data_prep:
  source: synthetic
  synthetic: {num_items: 90, num_users: 80, clicks_per_user: 14}
  shards: {max_samples: 30}
pretrain:
  num_ranks: 2
  encoder: {num_layers: 1, width: 32, num_heads: 2, hidden: 64, image_size: 32, max_text_tokens: 24}
  tokenizer: {vocabulary_size: 400}
  epochs: 1
features:
graph: {num_ranks: 2, num_partitions: 2}
align: {mode: sampled, num_ranks: 2, epochs: 2, batch_size: 256}
ablation: {mode: full, num_ranks: 1}
evaluation:
export: {top_k: 7}
"""


def launch(folder: Path, *words: str) -> dict[str, Any]:
    """Run the recipe and return what it says of itself to a program."""
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    environment["PYTHONPATH"] = str(ROOT)
    environment["ALIGNREC_HOME"] = str(folder / "home")  # no cluster is up there
    result = subprocess.run(
        [sys.executable, "-m", "launch", "run", "small.yaml", "--run-dir", "run", "--json", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    summary: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return summary


def states(summary: dict[str, Any]) -> dict[str, str]:
    return {stage["name"]: stage["state"] for stage in summary["stages"]}


def test_the_whole_path_and_what_runs_again(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE)
    run = tmp_path / "run"
    assert states(launch(tmp_path)) == dict.fromkeys(STAGES, "ran")
    for stage in STAGES:
        artifacts.verify(run / stage)
    assert (run / "graph.logs" / "rank_1.log").exists()
    _check_lists(run)
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    models = {"alignrec", "ablation", "popularity", "zero_shot", "item_cf"}
    assert models <= metrics.keys()
    page = (run / "evaluation" / "report" / "index.html").read_text()
    assert "data:image/jpeg;base64," in page
    before = {stage: artifacts.read(run / stage).identity for stage in STAGES}

    assert states(launch(tmp_path)) == dict.fromkeys(STAGES, "reused")

    again = states(launch(tmp_path, "--set", "align.learning_rate=0.01"))
    assert again == dict.fromkeys(FIRST, "reused") | dict.fromkeys(LAST, "ran")
    assert artifacts.read(run / "align").identity != before["align"]


def _check_lists(run: Path) -> None:
    """Every user has a full list of known items, none of them one that trained."""
    lists = pq.read_table(run / "export" / "topk.parquet").to_pydict()
    assert len(lists["user_key"]) == 80 * 7
    keys = read_items(run / "data_prep")["item_key"].to_pylist()
    users = pq.read_table(run / "data_prep" / "users.parquet")["user_key"].to_pylist()
    assert set(lists["item_key"]) <= set(keys)
    train = pq.read_table(run / "data_prep" / "interactions" / "train.parquet").to_pydict()
    seen = {
        (users[user], keys[item])
        for user, item in zip(train["user_index"], train["item_index"], strict=True)
    }
    assert not seen & set(zip(lists["user_key"], lists["item_key"], strict=True))
