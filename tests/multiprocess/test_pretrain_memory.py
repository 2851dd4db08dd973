"""The plan's peak memory is what torch's allocator counts while a step is done."""

import gc
import json
import math
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from alignrec import configuration
from alignrec.distributed.process_group import process_group
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.codebook import Codebook, PatchFeatures
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.engine import Engine, deepspeed_group
from alignrec.pretrain.memory import memory_per_rank
from alignrec.pretrain.objective import MaskedBatch, build_model, loss_weights
from alignrec.pretrain.planning import target_size
from alignrec.pretrain.targets import CodebookTarget, PictureTarget, VqkdTarget
from alignrec.pretrain.vqkd import VqkdTokenizer
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

VOCABULARY, LENGTH, NUM_RANKS = 1024, 16, 2
ENCODER = {
    "num_layers": 4,
    "width": 64,
    "num_heads": 4,
    "hidden": 256,
    "image_size": 64,
    "max_text_tokens": LENGTH,
}
CASES: dict[str, dict[str, Any]] = {
    # activations decide, or the parameters' own; ZeRO-3 last, see test_pretrain_zero.py
    "zero_0": {"zero_stage": 0, "global_batch_size": 32},
    "zero_0_small_batch": {"zero_stage": 0, "global_batch_size": 2},
    "zero_1": {"zero_stage": 1, "global_batch_size": 32},
    "zero_2": {"zero_stage": 2, "global_batch_size": 32},
    "zero_2_average": {"zero_stage": 2, "global_batch_size": 16, "ema_decay": 0.9},
    "recomputed": {"zero_stage": 2, "global_batch_size": 32, "activation_checkpointing": True},
    "accumulated": {"zero_stage": 0, "global_batch_size": 32, "micro_batch_size": 8},
    "codebook": {
        "zero_stage": 2,
        "global_batch_size": 32,
        "objective": {"targets": "codebook"},
    },
    "vqkd": {
        "zero_stage": 2,
        "global_batch_size": 32,
        "objective": {"targets": "vqkd", "vqkd": "made_here.pth"},
    },
    "zero_3": {"zero_stage": 3, "global_batch_size": 32},
}


def make_config(name: str) -> PretrainConfig:
    section = {"encoder": ENCODER, **CASES[name]}
    return configuration.build(PretrainConfig, section, section="pretrain")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("traces")
    of_ranks = run_ranks(measure, NUM_RANKS, folder, timeout_seconds=300)
    # ranks need as much; a thread that is late to free what it has summed adds to one of them
    return {name: min((r[name] for r in of_ranks), key=itemgetter("peak")) for name in CASES}


def measure(folder: Path) -> dict[str, dict[str, Any]]:
    result: dict[str, dict[str, Any]] = {}
    with process_group() as rank, deepspeed_group():
        for name in CASES:
            config = make_config(name)
            gc.collect()  # what is left of the case before is not to be freed during this one
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                model = build_model(
                    config.encoder.architecture(VOCABULARY),
                    config.objective,
                    seed=0,
                    target=make_target(config),
                )
                model.encoder.encoder.recompute = config.activation_checkpointing
                sizes = [parameter.numel() for parameter in model.parameters()]
                train(Engine(model, config, rank), config)
            path = folder / f"{name}_{rank.index}.json"
            recorded.export_chrome_trace(str(path))
            result[name] = {
                "peak": peak_bytes(path),
                "num_parameters": sum(sizes),
                "largest": max(sizes),
                "target": target_size(
                    config,
                    config.encoder.architecture(VOCABULARY),
                    model.target,
                    micro_batch_size=config.split_batch(NUM_RANKS)[0],
                ),
            }
    return result


def make_target(config: PretrainConfig) -> PictureTarget | None:
    match config.objective.targets:
        case "codebook":
            values, codes = 3 * 16**2, 2048
            features = PatchFeatures(
                torch.randint(-(2**20), 2**20, (64, values)).double(),
                torch.zeros(64, dtype=torch.float64),
            )
            centers = torch.randint(-99, 99, (codes, 64)).float()
            means = torch.zeros(codes, values, dtype=torch.uint8)
            counts = torch.zeros(codes, dtype=torch.int64)
            return CodebookTarget(Codebook(features, centers, means, counts, {}), 16)
        case "vqkd":
            return VqkdTarget(
                VqkdTokenizer(
                    num_layers=4, width=512, hidden=2048, patches_per_side=4, num_codes=256
                )
            )
        case "pixels":
            return None


def train(engine: Engine, config: PretrainConfig) -> None:
    micro, accumulation = config.split_batch(NUM_RANKS)
    architecture = config.encoder.architecture(VOCABULARY)
    weights = loss_weights(config.objective) / 1000
    for step in range(2):
        for _ in range(accumulation):
            losses, predictions = engine.forward(make_batch(architecture, micro))
            engine.backward((losses * weights).sum())
            engine.step(1e-4)
        engine.average(step + 1)
    assert predictions.logits.isfinite().all()


def make_batch(architecture: Architecture, size: int) -> MaskedBatch:
    masked_patches = torch.zeros(size, architecture.num_patches, dtype=torch.bool)
    masked_patches[:, : round(0.4 * architecture.num_patches)] = True
    masked_text = torch.zeros(size, LENGTH, dtype=torch.bool)
    masked_text[:, 1 : 1 + math.ceil(0.5 * (LENGTH - 2))] = True
    side = architecture.image_size
    return MaskedBatch(
        item_index=torch.arange(size),
        images=torch.randint(0, 256, (size, side, side, 3), dtype=torch.uint8),
        has_image=torch.ones(size, dtype=torch.bool),
        targets=torch.randint(5, VOCABULARY, (size, LENGTH)),
        tokens=torch.randint(5, VOCABULARY, (size, LENGTH)),
        text_padding=torch.zeros(size, LENGTH, dtype=torch.bool),
        masked_text=masked_text,
        masked_patches=masked_patches,
        text_places=masked_text.flatten().nonzero().squeeze(1),
        patch_places=masked_patches.flatten().nonzero().squeeze(1),
    )


def peak_bytes(trace: Path) -> int:
    """Return the largest sum of what was allocated during the trace and not yet freed."""
    events = [e for e in json.loads(trace.read_text())["traceEvents"] if e["name"] == "[memory]"]
    living: dict[int, int] = {}  # address -> bytes; older tensors' ends are not counted
    total = peak = 0
    for event in sorted(events, key=lambda e: e["ts"]):
        if event["args"]["Device Type"] != 0:
            continue
        address, change = event["args"]["Addr"], event["args"]["Bytes"]
        if change > 0:
            living[address] = change
            total += change
            peak = max(peak, total)
        else:
            total -= living.pop(address, 0)
    return peak


@pytest.mark.parametrize("name", list(CASES))
def test_peaks_are_within_15_percent(measured: dict[str, dict[str, Any]], name: str) -> None:
    config, found = make_config(name), measured[name]
    planned = memory_per_rank(
        config,
        config.encoder.architecture(VOCABULARY),
        num_parameters=found["num_parameters"],
        largest=found["largest"],
        num_ranks=NUM_RANKS,
        target=found["target"],
    )
    assert planned.peak == pytest.approx(found["peak"], rel=0.15)
