"""SIGKILL of a rank of the pretrain stage at ten random moments: the weights are a quiet run's.

And once while held-out items are judged, and once while the artifact is published.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from alignrec import artifacts
from alignrec.pretrain.training import CHECKPOINTS
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER

pytestmark = [pytest.mark.integration, pytest.mark.slow]

NUM_KILLS = 10
SEED = int(os.environ.get("ALIGNREC_KILLS_SEED", "0"))
SETTINGS = {
    **{f"encoder.{name}": value for name, value in TINY_ENCODER.items()},
    "tokenizer.vocabulary_size": 320,
    "max_steps": 200,
    "epochs": 100,
    "global_batch_size": 8,
    "micro_batch_size": 2,
    "checkpoint_steps": 4,
    "log_steps": 1,
}
LONGEST_SECONDS = 600
POLL_SECONDS = 0.002
# Where a kill falls: while the ranks start, among the steps, or while a checkpoint is written.
MOMENTS = ("start", "steps", "checkpoint")
# Runs the stage by the arguments after the first; rank 1 dies in the middle of judging held-out
# items, or rank 0 with the encoder written and no manifest.
DIES = """
import os, signal, sys
import torch
from alignrec import artifacts
from alignrec.pretrain import STAGE, training
from alignrec.stage import main
forward, checksums = training.Engine.forward, artifacts.checksums
def die_if(wanted):
    if wanted:
        os.kill(os.getpid(), signal.SIGKILL)
def dying_forward(engine, batch):
    die_if(not torch.is_grad_enabled() and os.environ["RANK"] == "1")
    return forward(engine, batch)
def dying_checksums(folder, **named):
    die_if((folder / "encoder.safetensors").exists())
    return checksums(folder, **named)
if sys.argv[1] == "judging":
    training.Engine.forward = dying_forward
else:
    artifacts.checksums = dying_checksums
sys.exit(main(STAGE, sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain_kills") / "dataset"
    return write_dataset(folder, num_items=48, image_size=16, without_image=(4, 7))


def command(dataset: Path, output: Path, *program: str) -> list[str]:
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folders = ["--dataset", str(dataset), "--output", str(output)]
    sets = [part for k, v in SETTINGS.items() for part in ("--set", f"pretrain.{k}={v}")]
    return [sys.executable, *ranks, *(program or ("-m", "alignrec.pretrain")), *folders, *sets]


def ranks_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        children = psutil.Process(process.pid).children(recursive=True)
        return [p for p in children if "alignrec.pretrain" in p.cmdline()]
    return []


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with log.open("ab") as out:
        return subprocess.Popen(words, env=environment, stdout=out, stderr=out)


def wait_until(process: subprocess.Popen[bytes], happened: Callable[[], bool]) -> None:
    """Return when it has happened or the run is over."""
    deadline = time.monotonic() + LONGEST_SECONDS
    while process.poll() is None and not happened():
        assert time.monotonic() < deadline, "the run makes no progress"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(POLL_SECONDS)


def last_row_time(logs: Path) -> float:
    rows = read_history(logs)
    return rows[-1]["time"] if rows else 0.0


def wait_for_moment(
    process: subprocess.Popen[bytes], output: Path, moment: str, rng: random.Random
) -> str:
    """Wait for the moment of a kill and say when it was."""
    logs = output.with_name(output.name + ".logs")
    checkpoints = artifacts.partial_path(output) / artifacts.WORK / CHECKPOINTS
    delay = rng.uniform(1, 12) if moment == "start" else rng.uniform(0, 1)
    if moment != "start":
        began = time.time()
        wait_until(process, lambda: last_row_time(logs) > began)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay)
    if moment == "checkpoint":
        wait_until(process, lambda: any(checkpoints.glob("*.partial")))
    return f"{moment} + {delay:.2f} s, after step {len(read_history(logs))}"


def kill_a_rank(process: subprocess.Popen[bytes], rng: random.Random) -> int:
    """Kill one rank, as soon as there are any, and return the exit code of the whole."""
    wait_until(process, lambda: len(ranks_of(process)) == 2)
    for rank in rng.sample(ranks := ranks_of(process), min(1, len(ranks))):
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    return process.wait(LONGEST_SECONDS)


def test_twelve_kills_change_no_bit_of_the_weights(dataset: Path, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    log, quiet, killed = (tmp_path / name for name in ("log", "quiet", "killed"))
    assert start(command(dataset, quiet), log).wait(LONGEST_SECONDS) == 0, log.read_text()
    found, torn = [], 0
    for number in range(NUM_KILLS):
        process = start(command(dataset, killed), log)
        told = wait_for_moment(process, killed, MOMENTS[number % len(MOMENTS)], rng)
        code = kill_a_rank(process, rng)
        if code == 0:
            break
        folder = artifacts.partial_path(killed) / artifacts.WORK / CHECKPOINTS
        torn += any(folder.glob("*.partial"))
        found.append(told)
    print(f"seed {SEED}, {torn} in the middle of a checkpoint:", *found, sep="\n  ")
    assert len(found) == NUM_KILLS, "the run ended before it was killed: make it longer"
    for moment in ("judging", "publishing"):
        dying = command(dataset, killed, "--no-python", sys.executable, "-c", DIES, moment)
        assert start(dying, log).wait(LONGEST_SECONDS) != 0
        assert len(read_history(killed.with_name("killed.logs"))) == SETTINGS["max_steps"]
        written = (artifacts.partial_path(killed) / "encoder.safetensors").exists()
        assert written == (moment == "publishing")
        assert not killed.exists()
    assert start(command(dataset, killed), log).wait(LONGEST_SECONDS) == 0, log.read_text()
    assert log.read_text().count("resumed after step 200") == 2
    for name in ("encoder.safetensors", "encoder.json", "tokenizer.json"):
        assert (quiet / name).read_bytes() == (killed / name).read_bytes(), name
    losses = [[row["loss"] for row in read_history(folder)] for folder in (quiet, killed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == SETTINGS["max_steps"]
