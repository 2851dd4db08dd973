"""Towers under DeepSpeed: ranks and ZeRO stages change nothing, and stopped runs go on."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from alignrec import configuration
from alignrec.distributed.process_group import barrier, process_group
from alignrec.pretrain import training
from alignrec.pretrain.config import EncoderConfig, PretrainConfig
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.tower_models import read_weights
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import context_of, run_until
from alignrec.testing.processes import run_ranks
from alignrec.testing.towers import write_bert, write_resnet, write_vit

pytestmark = pytest.mark.multiprocess

NUM_STEPS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two towers, a dataset and the runs that the tests compare."""
    folder = tmp_path_factory.mktemp("towers")
    write_vit(folder / "vit")
    write_resnet(folder / "resnet")
    write_bert(folder / "bert")
    write_dataset(
        folder / "dataset", num_items=32, image_size=16, without_image=(4, 7), without_text=(5, 7)
    )
    run_ranks(on_one_rank, 1, folder, timeout_seconds=300)
    run_ranks(on_two_ranks, 2, folder, timeout_seconds=300)
    return folder


def make_config(folder: Path, *, vision: str = "vit", **changes: Any) -> PretrainConfig:
    encoder = {
        "kind": "towers",
        "vision": str(folder / vision),
        "text": str(folder / "bert"),
        "num_layers": 1,
        "num_heads": 2,
        "hidden": 24,
        "image_size": 16,
        "patch_size": 4,
        "max_text_tokens": 20,
        **changes.pop("encoder", {}),
    }
    section = {
        "encoder": encoder,
        "max_steps": NUM_STEPS,
        "valid_fraction": 0.1,
        "global_batch_size": 8,
        "learning_rate": 5e-3,
        "checkpoint_steps": 2,
        "timeout_seconds": 60,
        **changes,
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def pretrain(folder: Path, name: str, **changes: Any) -> None:
    """Run the stage on this rank."""
    config = make_config(folder, **changes)
    training.run(config, context_of(config, folder / "dataset", folder / name))


def pretrain_until(folder: Path, name: str, step: int, **changes: Any) -> None:
    config = make_config(folder, **changes)
    run_until(config, folder / "dataset", folder / name, step=step)


BF16: dict[str, Any] = {"precision": "bf16", "max_steps": 1, "global_batch_size": 4}
FROZEN: dict[str, Any] = {"vision": "resnet", "encoder": {"frozen": ["vision"]}}


BF16_FROZEN = {
    "bf16_vision": ["vision"],
    "bf16_text": ["text"],
    "bf16_both": ["vision", "text"],
}


def on_one_rank(folder: Path) -> None:
    with process_group() as _, deepspeed_group():
        pretrain(folder, "plain", zero_stage=0)
        pretrain(folder, "slow", zero_stage=0, encoder={"tower_rate": 0.0})
        pretrain(folder, "frozen", zero_stage=0, **FROZEN)
        pretrain_until(folder, "frozen_resumed", 3, zero_stage=0, **FROZEN)
        for name, frozen in BF16_FROZEN.items():
            pretrain(folder, name, zero_stage=1, encoder={"frozen": frozen}, **BF16)


def on_two_ranks(folder: Path) -> None:
    # ZeRO-3 comes last: it replaces torch's linear function for the rest of the process.
    with process_group(timeout_seconds=60) as rank, deepspeed_group():
        for stage in (0, 2, 3):
            pretrain_until(folder, f"stage_{stage}", 3, zero_stage=stage)
            barrier(rank)
            pretrain(folder, f"stage_{stage}", zero_stage=stage)
        # what a hub says by now is not asked again
        with mock.patch.object(EncoderConfig, "architecture", side_effect=AssertionError):
            pretrain(folder, "frozen_resumed", zero_stage=3, **FROZEN)


def weights_of(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / name / "encoder.safetensors")


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5, msg=name)


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_stopped_runs_of_two_ranks_end_as_one_rank_does(folder: Path, stage: int) -> None:
    assert_close(weights_of(folder, f"stage_{stage}"), weights_of(folder, "plain"))


def test_a_run_with_a_frozen_tower_goes_on_under_another_stage(folder: Path) -> None:
    found = weights_of(folder, "frozen_resumed")
    assert_close(found, weights_of(folder, "frozen"))
    for name, tensor in read_weights(str(folder / "resnet"), "vision").items():
        assert torch.equal(found[f"vision_tower.model.{name}"], tensor), name


@pytest.mark.parametrize("name", BF16_FROZEN)
def test_frozen_towers_under_bf16_stay_as_they_were_given(folder: Path, name: str) -> None:
    found = weights_of(folder, name)
    for modality, source in (("vision", "vit"), ("text", "bert")):
        for key, tensor in read_weights(str(folder / source), modality).items():
            same = torch.equal(found[f"{modality}_tower.model.{key}"], tensor)
            assert same or modality not in BF16_FROZEN[name], key
    assert not math.isclose(float(found["mask_token"].abs().sum()), 0.0)


def test_a_rate_of_zero_leaves_towers_as_they_are(folder: Path) -> None:
    given = {
        f"{modality}_tower.model.{name}": tensor
        for modality, source in (("vision", "vit"), ("text", "bert"))
        for name, tensor in read_weights(str(folder / source), modality).items()
    }
    slow, plain = weights_of(folder, "slow"), weights_of(folder, "plain")
    moved = [name for name in given if not torch.equal(slow[name], given[name])]
    assert not moved
    moved = [name for name in given if not torch.equal(plain[name], given[name])]
    assert len(moved) > len(given) / 2
    assert not math.isclose(float(slow["mask_token"].abs().sum()), 0.0)
