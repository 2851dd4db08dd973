"""SIGKILL of a rank of the align stage at ten random moments: the end is that of a quiet run."""

import contextlib
import os
import random
import subprocess
import sys
from pathlib import Path
from threading import Event
from typing import Any

import psutil
import pytest

from alignrec import artifacts
from alignrec.align import STAGE
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_KILLS = 10
NUM_ITEMS = 120
SETTINGS = {
    "embedding_dim": 16, "batch_size": 64, "epochs": 30, "learning_rate": 0.005, "patience": 30,
    "checkpoint_steps": 7,
}  # fmt: skip
SAMPLED = {"mode": "sampled", "num_ranks": 2, "num_neighbors": "[4, 4]"}
LONGEST_SECONDS = 600


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("align_kills")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=300)
    features = write_features(root / "features", num_items=NUM_ITEMS)
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=5, num_partitions=4)
    return {"dataset": dataset, "features": features, "graph": graph}


def command(folders: dict[str, Path], output: Path, settings: dict[str, Any]) -> list[str]:
    ranks = settings.get("num_ranks", 1)
    start = ["-m", "alignrec.align"]
    if ranks > 1:
        start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *start]
    inputs = [part for kind, path in folders.items() for part in (f"--{kind}", str(path))]
    sets = [part for k, v in settings.items() for part in ("--set", f"align.{k}={v}")]
    return [sys.executable, *start, *inputs, "--output", str(output), *sets]


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """Return the processes that run the stage: under torchrun its children, else the process."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        if "torch.distributed.run" in parent.cmdline():
            return [p for p in parent.children(True) if "alignrec.align" in p.cmdline()]
        return [parent]
    return []


def run(words: list[str], log: Path, *, kill_after: float | None, rng: random.Random) -> int:
    """Run the stage, or kill one of its ranks some seconds after it began; return the exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("ab") as out:
        process = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
        if kill_after is None:
            return process.wait(LONGEST_SECONDS)
        while process.poll() is None and not ranks_of(process):  # busy machines start them late
            Event().wait(0.05)
        try:
            return process.wait(kill_after)
        except subprocess.TimeoutExpired:
            for rank in rng.sample(ranks := ranks_of(process), min(1, len(ranks))):
                with contextlib.suppress(psutil.NoSuchProcess):
                    rank.kill()
            return process.wait(LONGEST_SECONDS)


@pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["full", "sampled"])
def test_ten_kills_change_nothing(
    folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any]
) -> None:
    rng = random.Random(0)
    settings = {**SETTINGS, **settings}
    log = tmp_path / "log"
    quiet = command(folders, tmp_path / "quiet", settings)
    assert run(quiet, log, kill_after=None, rng=rng) == 0, log.read_text()
    killed = command(folders, tmp_path / "killed", settings)
    kills = 0
    while kills < NUM_KILLS and not (tmp_path / "killed").exists():
        # Starting takes some seconds: moments before, in and after the first steps all occur.
        kills += run(killed, log, kill_after=rng.uniform(2, 9), rng=rng) != 0
    assert run(killed, log, kill_after=None, rng=rng) == 0, log.read_text()
    assert kills >= 3, "the run ended before it was killed: make it longer"
    for name in ("embeddings.safetensors", "model.safetensors"):
        same = (tmp_path / "quiet" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
        assert same, name
    facts = [artifacts.read(tmp_path / name, STAGE.kind).facts for name in ("quiet", "killed")]
    assert facts[0]["valid"] == facts[1]["valid"]
    assert facts[0]["best_epoch"] == facts[1]["best_epoch"]
