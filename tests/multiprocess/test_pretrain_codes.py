"""Codes of patches as targets: one rank, two ranks and a resumed run agree."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from alignrec import artifacts, configuration
from alignrec.distributed.process_group import process_group
from alignrec.pretrain import training
from alignrec.pretrain.codebook import CODEBOOK
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.vqkd import VqkdTokenizer
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, context_of, run_until
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

SETTINGS: dict[str, Any] = {
    "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
    "tokenizer": {"vocabulary_size": 320},
    "max_steps": 4,
    "valid_fraction": 0.2,
    "global_batch_size": 8,
    "learning_rate": 5e-3,
    "log_steps": 1,
    "checkpoint_steps": 2,
    "timeout_seconds": 120,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    dataset = folder / "dataset"
    write_dataset(dataset, num_items=48, image_size=16, without_image=(4, 7), without_text=(5, 7))
    torch.manual_seed(0)
    tokenizer = VqkdTokenizer(
        num_layers=1, width=64, hidden=64, patch_size=4, patches_per_side=4, num_codes=20
    )
    torch.nn.init.normal_(tokenizer.quantize.embedding.weight)
    torch.save({"model": tokenizer.state_dict()}, folder / "vqkd.pth")
    run_ranks(on_one_rank, 1, folder, timeout_seconds=300)
    run_ranks(on_two_ranks, 2, folder, timeout_seconds=300)
    return folder


def make_config(folder: Path, targets: str, **changes: Any) -> PretrainConfig:
    given = {"vqkd": str(folder / "vqkd.pth")} if targets == "vqkd" else {}
    section = {**SETTINGS, "objective": {"targets": targets, **given}, **changes}
    return configuration.build(PretrainConfig, section, section="pretrain")


def pretrain(folder: Path, name: str, targets: str, **changes: Any) -> None:
    config = make_config(folder, targets, **changes)
    training.run(config, context_of(config, folder / "dataset", folder / name))


def on_one_rank(folder: Path) -> None:
    with process_group() as _, deepspeed_group():
        for targets in ("codebook", "vqkd"):
            pretrain(folder, f"{targets}_1", targets)
        config = make_config(folder, "codebook")
        run_until(config, folder / "dataset", folder / "resumed", step=3)
        pretrain(folder, "resumed", "codebook")


def on_two_ranks(folder: Path) -> None:
    with process_group() as _, deepspeed_group():
        pretrain(folder, "codebook_2", "codebook", precision="bf16", zero_stage=2)
        for targets in ("codebook", "vqkd"):  # ZeRO-3 last, see test_pretrain_zero.py
            pretrain(folder, f"{targets}_3", targets, zero_stage=3)


@pytest.mark.parametrize("targets", ["codebook", "vqkd"])
def test_two_ranks_under_zero_3_end_with_the_weights_of_one(folder: Path, targets: str) -> None:
    alone, together = (
        load_file(folder / f"{targets}_{name}" / "encoder.safetensors") for name in (1, 3)
    )
    for name, tensor in alone.items():
        torch.testing.assert_close(together[name], tensor, rtol=1e-3, atol=2e-5, msg=name)
    held_out = [artifacts.read(folder / f"{targets}_{name}").facts["held_out"] for name in (1, 3)]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-3)
    baseline = {"codebook": "image_loss_unigram", "vqkd": "image_loss_entropy"}
    assert {"image_accuracy", baseline[targets]} <= held_out[0].keys()


def test_the_codebook_is_the_same_on_any_ranks_and_told_in_the_manifest(folder: Path) -> None:
    books = [(folder / f"codebook_{name}" / CODEBOOK).read_bytes() for name in (1, 2, 3)]
    assert books[0] == books[1] == books[2]
    facts = artifacts.verify(folder / "codebook_1").facts["targets"]
    assert 1 < facts["num_codes"] <= facts["num_patches"] / 32
    assert facts["quantisation_error"] < facts["mean_patch_error"]
    assert not (folder / "vqkd_1" / CODEBOOK).exists()


def test_a_resumed_run_ends_with_the_same_bytes(folder: Path) -> None:
    for name in ("encoder.safetensors", CODEBOOK):
        resumed = (folder / "resumed" / name).read_bytes()
        assert resumed == (folder / "codebook_1" / name).read_bytes()


def test_losses_and_accuracy_of_codes_are_logged(folder: Path) -> None:
    for name in ("codebook_1", "codebook_2", "vqkd_3"):
        rows = read_history(folder / name)
        assert len(rows) == 4
        assert all(0 <= row["image_accuracy"] <= 1 < row["loss/image"] for row in rows)


def test_reconstructions_hold_what_codes_can_show(folder: Path) -> None:
    codebook, vqkd = (
        np.load(folder / f"{targets}_1" / "reconstructions.npz") for targets in ("codebook", "vqkd")
    )
    assert codebook["predicted"].shape == codebook["target"].shape == codebook["original"].shape
    assert "predicted" not in vqkd
    for shown in (codebook, vqkd):
        right, masked = shown["patches_right"].T
        assert (right <= masked).all()
        assert masked.tolist() == (6 * shown["has_image"]).tolist()
