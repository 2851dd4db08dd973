"""How far training is, and what its latest steps have shown (steps -> history, checkpoints)."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from alignrec.align.schedule import Selection


@dataclasses.dataclass
class Stretch:
    """Steps that one row of the history tells of.

    Attributes:
        steps: how many.
        seconds: how long they took.
        sums: their loss terms, summed, by name.
    """

    steps: int = 0
    seconds: float = 0.0
    sums: dict[str, float] = dataclasses.field(default_factory=dict)

    def losses(self) -> dict[str, float]:
        """Return the mean of each loss term, by its name in the history."""
        return {f"loss/{name}": total / self.steps for name, total in self.sums.items()}


@dataclasses.dataclass
class Position:
    """How far training is: what a checkpoint keeps beside the trainer's tensors.

    Attributes:
        epoch: epoch in progress.
        step: steps of that epoch that are done.
        selection: evaluations so far.
        recent: steps since the last row of the history.
        train_seconds: time in steps.
        evaluate_seconds: time in evaluations.
    """

    epoch: int = 0
    step: int = 0
    selection: Selection = dataclasses.field(default_factory=Selection)
    recent: Stretch = dataclasses.field(default_factory=Stretch)
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """Return what ``dataclasses.asdict`` made JSON of."""
        inner = {"selection": Selection(**state["selection"]), "recent": Stretch(**state["recent"])}
        return cls(**{**state, **inner})


class StepCounter:
    """Counts steps into a position; their losses stay where they are computed until asked for.

    To read a number from an accelerator waits for all that it has to do.

    Attributes:
        position: up to date but for the sums of ``recent``.
    """

    def __init__(self, position: Position) -> None:
        self.position = position
        self._sums: Float[Tensor, " terms"] | None = None
        self._names: list[str] = []
        self._last = time.monotonic()

    def start(self) -> None:
        """Measure the time of steps from now on."""
        self._last = time.monotonic()

    def count(self, terms: Mapping[str, Tensor]) -> None:
        """Count a step with its loss terms; none for an empty batch."""
        self.position.step += 1
        self.position.recent.steps += 1
        if terms:
            self._add(terms)
        self._measure()

    def settle(self) -> Position:
        """Return the position with the sums up to now."""
        recent = self.position.recent
        if self._sums is not None:
            recent.sums = dict(zip(self._names, self._sums.tolist(), strict=True))
        self._measure()
        return self.position

    def take(self) -> Stretch:
        """Return the steps since the last row, and begin another stretch."""
        stretch = self.settle().recent
        self.position.recent = Stretch()
        self._sums = None
        return stretch

    def _add(self, terms: Mapping[str, Tensor]) -> None:
        values = torch.stack([term.double() for term in terms.values()])
        if self._sums is None:
            before = self.position.recent.sums  # of a checkpoint
            self._names = list(terms)
            self._sums = values.new_tensor([before.get(name, 0.0) for name in terms])
        self._sums += values

    def _measure(self) -> None:
        now = time.monotonic()
        self.position.recent.seconds += now - self._last
        self.position.train_seconds += now - self._last
        self._last = now
