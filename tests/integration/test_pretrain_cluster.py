"""Pretraining under Ray Train: a dead rank is started again, and the weights are torchrun's."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from alignrec import artifacts, configuration
from alignrec.distributed.process_group import rank_from_environment
from alignrec.pretrain import STAGE as PRETRAIN
from alignrec.pretrain import training
from alignrec.pretrain.config import PretrainConfig
from alignrec.stage import Context, Stage
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER
from cluster import engine, worker_group
from cluster.config import ClusterConfig

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SETTINGS: dict[str, Any] = {
    "num_ranks": 2,
    "encoder": TINY_ENCODER,
    "tokenizer": {"vocabulary_size": 320},
    "max_steps": 20,
    "epochs": 10,
    "global_batch_size": 8,
    "checkpoint_steps": 5,
}
STAGE = Stage(
    PRETRAIN.name, PRETRAIN.kind, PRETRAIN.config, f"{Path(__file__).stem}:work", PRETRAIN.inputs
)


def work(config: PretrainConfig, context: Context) -> None:
    """Pretrain; in the first attempt rank 1 dies as soon as there is a checkpoint."""
    killed = context.log_dir / "killed"
    if rank_from_environment().index == 1 and not killed.exists():
        threading.Thread(target=die, args=(context.output, killed), daemon=True).start()
    training.run(config, context)


def die(output: Path, killed: Path) -> None:
    checkpoints = artifacts.partial_path(output) / artifacts.WORK / training.CHECKPOINTS
    while not any(checkpoints.glob(f"step_*0/{artifacts.MANIFEST}")):
        time.sleep(0.005)
    killed.touch()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_dies_and_the_weights_are_those_of_a_quiet_torchrun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=32, image_size=16)
    config = configuration.build(PretrainConfig, SETTINGS, section="pretrain")
    inputs = {"dataset": dataset}
    ray_output, shown = tmp_path / "ray", list[str]()
    context = Context(inputs, ray_output, STAGE.fingerprint(config, inputs), tmp_path / "ray.logs")
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    )
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("ALIGNREC_HOME", "/nonexistent")
    with engine.connected(ClusterConfig(object_store_bytes=100_000_000), num_ranks=2):
        worker_group.run_stage(
            STAGE,
            config,
            context,
            num_ranks=2,
            cluster=ClusterConfig(max_restarts=1, cpus_per_rank=1),
            run="test",
            show=shown.append,
        )
    assert any("died" in line and "Restart 1 of 1" in line for line in shown)
    assert any("resumed after step" in line for line in shown)
    under_torchrun(dataset, tmp_path / "torchrun")
    name = "encoder.safetensors"
    assert (ray_output / name).read_bytes() == (tmp_path / "torchrun" / name).read_bytes()


def under_torchrun(dataset: Path, output: Path) -> None:
    recipe = output.with_suffix(".yaml")
    recipe.write_text(str({"pretrain": SETTINGS}))  # a flow mapping of YAML
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    folders = [f"--dataset={dataset}", f"--output={output}", f"--recipe={recipe}"]
    command = [sys.executable, *ranks, "-m", "alignrec.pretrain", *folders]
    subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
