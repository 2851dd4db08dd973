"""The plan's activations of towers are what the allocator holds after a forward pass."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from alignrec import configuration
from alignrec.pretrain import planning
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.memory import memory_per_rank
from alignrec.pretrain.objective import MaskedBatch, MaskedModel, build_model
from alignrec.testing.datasets import write_dataset
from alignrec.testing.towers import write_bert, write_resnet, write_vit

VOCABULARY, SIZE, LENGTH, ITEMS = 57, 64, 24, 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("towers")
    write_vit(folder / "vit", image_size=SIZE, patch_size=8)
    write_resnet(folder / "resnet")
    write_bert(folder / "bert")
    return folder


def make_config(folder: Path, *, vision: str, frozen: list[str]) -> PretrainConfig:
    section = {
        "encoder": {
            "kind": "towers",
            "vision": str(folder / vision),
            "text": str(folder / "bert"),
            "frozen": frozen,
            "num_layers": 1,
            "image_size": SIZE,
            "max_text_tokens": LENGTH,
        },
        "global_batch_size": ITEMS,
    }
    return configuration.build(PretrainConfig, section, section="pretrain")


def make_batch(num_patches: int) -> MaskedBatch:
    masked_patches = torch.zeros(ITEMS, num_patches, dtype=torch.bool)
    masked_patches[:, : round(0.4 * num_patches)] = True
    masked_text = torch.zeros(ITEMS, LENGTH, dtype=torch.bool)
    masked_text[:, 1:12] = True
    tokens = torch.randint(5, VOCABULARY, (ITEMS, LENGTH))
    return MaskedBatch(
        item_index=torch.arange(ITEMS),
        images=torch.randint(0, 256, (ITEMS, SIZE, SIZE, 3), dtype=torch.uint8),
        has_image=torch.ones(ITEMS, dtype=torch.bool),
        targets=tokens,
        tokens=tokens,
        text_padding=torch.zeros(ITEMS, LENGTH, dtype=torch.bool),
        masked_text=masked_text,
        masked_patches=masked_patches,
        text_places=masked_text.flatten().nonzero().squeeze(1),
        patch_places=masked_patches.flatten().nonzero().squeeze(1),
    )


def held_bytes(model: MaskedModel, batch: MaskedBatch, trace: Path) -> int:
    """Return the bytes that are held after a forward pass, the predictions before it included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        with torch.no_grad():
            before = model(batch)
        results = model(batch)
    recorded.export_chrome_trace(str(trace))
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    held = sum(event["args"]["Bytes"] for event in sorted(events, key=lambda e: e["ts"]))
    assert results[0].requires_grad
    assert not before[0].requires_grad
    return int(held)


@pytest.mark.parametrize(
    ("vision", "frozen"), [("vit", []), ("resnet", []), ("vit", ["vision"]), ("vit", ["text"])]
)
def test_activations_are_within_15_percent(
    folder: Path, tmp_path: Path, vision: str, frozen: list[str]
) -> None:
    config = make_config(folder, vision=vision, frozen=frozen)
    architecture = config.encoder.architecture(VOCABULARY)
    model = build_model(architecture, config.objective, seed=0)
    batch = make_batch(architecture.num_patches)
    held = held_bytes(model, batch, tmp_path / "trace.json")
    size = {"num_parameters": 1, "largest": 1, "num_ranks": 1}
    planned = memory_per_rank(config, architecture, **size).activations
    assert planned == pytest.approx(held, rel=0.15)


def test_frozen_towers_are_whole_on_every_rank(folder: Path, tmp_path: Path) -> None:
    config = make_config(folder, vision="vit", frozen=["vision", "text"])
    architecture = config.encoder.architecture(VOCABULARY)
    sizes: dict[str, Any] = {"num_parameters": 1000, "largest": 100, "num_ranks": 2}
    plain = memory_per_rank(config, architecture, **sizes)
    frozen = memory_per_rank(config, architecture, num_frozen=500, **sizes)
    assert frozen.parameters - plain.parameters == 4 * 500
    assert frozen.moments == plain.moments


def test_the_plan_knows_towers(folder: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=16, image_size=16)
    plain, frozen = (
        planning.plan(make_config(folder, vision="vit", frozen=names), dataset)
        for names in ([], ["vision", "text"])
    )
    assert plain.num_parameters == frozen.num_parameters
    assert plain.num_encoder_parameters == frozen.num_encoder_parameters
    assert frozen.memory[2].moments < plain.memory[2].moments
    assert frozen.memory[2].activations < plain.memory[2].activations / 1.5
