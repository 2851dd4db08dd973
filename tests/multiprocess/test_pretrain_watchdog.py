"""A rank of the pretrain stage that hangs is named by both, wherever it hangs."""

import time
from collections.abc import Callable
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch

from alignrec import checkpoint, configuration
from alignrec.distributed import watchdog
from alignrec.distributed.process_group import process_group
from alignrec.pretrain import training
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import TrainingData
from alignrec.pretrain.engine import deepspeed_group
from alignrec.pretrain.multiway import Layer
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import TINY_ENCODER, context_of
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

SETTINGS: dict[str, Any] = {
    "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
    "tokenizer": {"vocabulary_size": 320},
    "max_steps": 4,
    "epochs": 2,
    "valid_fraction": 0.3,
    "global_batch_size": 8,
    "log_steps": 1,
    "checkpoint_steps": 4,
    "timeout_seconds": 60,
    "watchdog_seconds": 1.0,
}
NAMED = "behind the others: rank 1"
# Where rank 1 hangs: at the first call after so many steps. What waits for the peers at the same
# place lies in different steps, because one standstill is told once.
FUNCTIONS: dict[str, tuple[Any, str, int]] = {
    "forward": (Layer, "forward", 1),
    "optimizer": (torch.optim.AdamW, "step", 3),
    "save": (training.Trainer, "_refuse_spoilt", 4),
    "files": (checkpoint, "_write", 4),
    "judge": (TrainingData, "held_out_batch", 4),
    "reconstructions": (training, "write_reconstructions", 4),
}
# By ZeRO stage, which decides where the peers wait; ZeRO-3 last, see test_pretrain_zero.py.
PLACES = {0: ["backward"], 2: ["backward", *FUNCTIONS], 3: ["backward", "forward"]}


class Hang:
    """Stands still once at each place, until both ranks have told who is behind."""

    def __init__(self, places: list[str], logs: Path) -> None:
        self.left = set(places)
        self.files = [logs / f"stacks_000{rank}.json" for rank in range(2)]
        self.num_steps = 0

    def told(self) -> list[str]:
        return [file.read_text() if file.exists() else "" for file in self.files]

    def at(self, place: str, num_steps: int) -> None:
        if self.num_steps < num_steps or place not in self.left:
            return
        self.left.remove(place)
        before, deadline = self.told(), time.monotonic() + 40
        while any(a == b for a, b in zip(self.told(), before, strict=True)):
            assert time.monotonic() < deadline, f"nothing was told of {place}"
            Event().wait(0.05)

    def first(self, place: str, function: Callable[..., Any], steps: int) -> Callable[..., Any]:
        def stuck_here(*arguments: Any, **named: Any) -> Any:
            self.at(place, steps)
            return function(*arguments, **named)

        return stuck_here

    def in_backward(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*arguments: Any) -> Any:
            losses, predictions = forward(*arguments)
            if losses.requires_grad:
                losses.register_hook(lambda _: self.at("backward", 2))
            return losses, predictions

        return hooked

    def counting(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*arguments: Any) -> Any:
            values = function(*arguments)
            self.num_steps += 1
            return values

        return step


def test_the_rank_that_hangs_is_named_wherever_it_hangs(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=32, image_size=16)
    for told in run_ranks(run, 2, dataset, tmp_path, timeout_seconds=200):
        for stage, places in PLACES.items():
            assert told[stage].count(NAMED) >= len(places), (stage, told[stage])


def run(dataset: Path, folder: Path) -> dict[int, list[str]]:
    with process_group(timeout_seconds=60) as rank, deepspeed_group():
        return {
            stage: hang_at(places, dataset, folder / f"stage_{stage}", stage, rank.index)
            for stage, places in PLACES.items()
        }


def hang_at(places: list[str], dataset: Path, output: Path, stage: int, rank: int) -> list[str]:
    """Train; returns what this rank found out about who is behind."""
    settings = {**SETTINGS, "zero_stage": stage}
    config = configuration.build(PretrainConfig, settings, section="pretrain")
    context = context_of(config, dataset, output)
    told: list[str] = []
    culprit = watchdog.Watchdog._culprit

    def found(self: watchdog.Watchdog) -> str:
        told.append(culprit(self))
        return told[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watchdog, "_GRACE_SECONDS", 0.3)
        patch.setattr(watchdog.Watchdog, "_culprit", found)
        if rank == 1:
            hang = Hang(places, context.log_dir)
            for place, (owner, name, steps) in FUNCTIONS.items():
                patch.setattr(owner, name, hang.first(place, getattr(owner, name), steps))
            engine, trainer = training.Engine, training.Trainer
            patch.setattr(engine, "forward", hang.in_backward(engine.forward))
            patch.setattr(trainer, "one_step", hang.counting(trainer.one_step))
        training.run(config, context)
        assert rank == 0 or not hang.left
    return told
