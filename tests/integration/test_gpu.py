"""Stages on a GPU give what they give on the CPU; skipped where there is no GPU."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignrec.graph.schema import neighbors_path
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.integration,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]

PRETRAIN = {
    "encoder.num_layers": 2,
    "encoder.width": 64,
    "encoder.num_heads": 2,
    "encoder.hidden": 128,
    "encoder.image_size": 32,
    "encoder.patch_size": 8,
    "encoder.max_text_tokens": 20,
    "tokenizer.vocabulary_size": 320,
    "global_batch_size": 8,
    "log_steps": 1,
    "epochs": 2,
}
ALIGN = {"embedding_dim": 16, "batch_size": 50, "epochs": 3, "learning_rate": 0.01}
STAGES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16"), (3, "bf16")]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return write_dataset(folder, num_items=40, num_users=30, image_size=32, without_image=(4,))


@pytest.fixture(scope="module")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that was trained on the CPU."""
    output = tmp_path_factory.mktemp("cpu") / "encoder"
    settings = PRETRAIN | {"zero_stage": 0}
    run("pretrain", {"dataset": dataset}, output, settings, on_gpu=False)
    return output


@pytest.fixture(scope="module")
def folders(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What the align stage reads."""
    root = tmp_path_factory.mktemp("align")
    features = write_features(root / "features", num_items=40)
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=4, num_partitions=2)
    return {"dataset": dataset, "features": features, "graph": graph}


def run(
    stage: str,
    inputs: Mapping[str, Path],
    output: Path,
    settings: Mapping[str, Any],
    *,
    on_gpu: bool,
    num_ranks: int = 1,
) -> None:
    """Run a stage as a command, under torchrun where it has several ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if not on_gpu:
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    start = [sys.executable]
    if num_ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"]
    folders = [part for kind, path in inputs.items() for part in (f"--{kind}", str(path))]
    sets = [part for k, v in settings.items() for part in ("--set", f"{stage}.{k}={v}")]
    command = [*start, "-m", f"alignrec.{stage}", *folders, "--output", str(output), *sets]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in read_history(output) if "loss" in row]


@pytest.mark.parametrize(("zero_stage", "precision"), STAGES)
def test_every_zero_stage_follows_the_cpu(
    dataset: Path, encoder: Path, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    output = tmp_path / "encoder"
    settings = PRETRAIN | {"zero_stage": zero_stage, "precision": precision}
    run("pretrain", {"dataset": dataset}, output, settings, on_gpu=True)
    wanted = losses(encoder)
    assert len(wanted) > 5
    tolerance = 1e-3 if precision == "fp32" else 3e-2
    assert losses(output) == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize(
    "settings",
    [
        {"compile": True},
        {"activation_checkpointing": True},
        {"zero_stage": 3, "offload": "parameters"},
        {"ema_decay": 0.9, "zero_stage": 2},
    ],
)
def test_options_follow_the_cpu(
    dataset: Path, encoder: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    output = tmp_path / "encoder"
    run("pretrain", {"dataset": dataset}, output, PRETRAIN | settings, on_gpu=True)
    assert losses(output) == pytest.approx(losses(encoder), rel=1e-3)


def test_features_are_those_of_the_cpu(dataset: Path, encoder: Path, tmp_path: Path) -> None:
    rows = []
    for on_gpu in (False, True):
        output = tmp_path / f"features_{on_gpu}"
        inputs = {"dataset": dataset, "encoder": encoder}
        run("features", inputs, output, {"extraction.pooling": "all"}, on_gpu=on_gpu)
        rows.append(np.load(output / "features.npy"))
    np.testing.assert_allclose(rows[0], rows[1], atol=1e-3)


def test_nearest_items_are_those_of_the_cpu(folders: dict[str, Path], tmp_path: Path) -> None:
    found = []
    for on_gpu in (False, True):
        output = tmp_path / f"graph_{on_gpu}"
        inputs = {kind: folders[kind] for kind in ("dataset", "features")}
        run("graph", inputs, output, {"k": 5, "num_partitions": 2}, on_gpu=on_gpu)
        found.append(np.load(neighbors_path(output, "cosine")))
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "num_ranks"),
    [({"mode": "full"}, 1), ({"mode": "full", "edge_dropout": 0.3}, 1), ({"mode": "sampled"}, 1),
     ({"mode": "sampled", "num_ranks": 2}, 2)],
)  # fmt: skip
def test_alignment_follows_the_cpu(
    folders: dict[str, Path], tmp_path: Path, settings: dict[str, Any], num_ranks: int
) -> None:
    history = []
    for on_gpu in (False, True):
        output = tmp_path / f"align_{on_gpu}"
        run("align", folders, output, ALIGN | settings, on_gpu=on_gpu, num_ranks=num_ranks)
        history.append(
            [{k: v for k, v in row.items() if "loss/" in k} for row in read_history(output)]
        )
    assert len(history[0]) == ALIGN["epochs"]
    for wanted, row in zip(*history, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
