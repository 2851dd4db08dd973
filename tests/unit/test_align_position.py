"""Steps are counted where losses are computed, and go on after a checkpoint as if it were not."""

import dataclasses
import json

import pytest
import torch

from alignrec.align import position as position_module
from alignrec.align.position import Position, StepCounter


def terms(step: int) -> dict[str, torch.Tensor]:
    return {"uia": torch.tensor(0.1 * step), "bpr": torch.tensor(1.0 / (step + 1))}


def count(counter: StepCounter, first: int, last: int) -> None:
    for step in range(first, last):
        counter.count({} if step == 2 else terms(step))


def test_a_row_has_the_means_of_the_steps_since_the_last_one() -> None:
    counter = StepCounter(Position())
    count(counter, 0, 4)
    losses = counter.take().losses()
    assert losses.keys() == {"loss/uia", "loss/bpr"}
    wanted = [terms(step)["bpr"].double() for step in (0, 1, 3)]
    assert losses["loss/bpr"] == float(torch.stack(wanted).sum()) / 4  # a step without triples
    count(counter, 4, 5)
    assert counter.take().losses()["loss/bpr"] == float(terms(4)["bpr"])
    assert counter.position.step == 5
    assert counter.take().losses() == {}


def test_counting_goes_on_after_a_checkpoint_to_the_same_bits() -> None:
    whole, broken = StepCounter(Position()), StepCounter(Position())
    count(whole, 0, 9)
    count(broken, 0, 4)
    state = json.loads(json.dumps(dataclasses.asdict(broken.settle()), sort_keys=True))
    resumed = StepCounter(Position.from_state(state))
    count(resumed, 4, 9)
    found, wanted = resumed.take(), whole.take()
    assert (found.steps, found.sums) == (wanted.steps, wanted.sums)
    assert resumed.position.step == whole.position.step == 9


def test_a_checkpoint_behind_the_last_step_of_an_epoch_keeps_its_sums() -> None:
    counter = StepCounter(Position())
    count(counter, 0, 4)
    resumed = StepCounter(Position.from_state(dataclasses.asdict(counter.settle())))
    assert resumed.take().sums == counter.take().sums


def test_time_between_steps_counts_and_time_before_them_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = [100.0]
    monkeypatch.setattr(position_module.time, "monotonic", lambda: clock[0])
    counter = StepCounter(Position())
    clock[0] += 50  # an evaluation
    counter.start()
    for _ in range(3):
        clock[0] += 2
        counter.count(terms(1))
    assert counter.take().seconds == 6
    clock[0] += 1
    counter.count(terms(1))
    assert counter.take().seconds == 1
    assert counter.position.train_seconds == 7
