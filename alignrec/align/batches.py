"""Triples of each step in full-graph mode (training interactions -> losses).

Order and negatives are those of ``alignrec.graph``'s loaders: a step consists of the interactions
whose hash of (seed, epoch, user, item) lies in the step's share of the hash's range. So both modes
train on the same triples, and a resume needs no state but (epoch, step).
"""

import dataclasses
import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.graph.loader import TripleOrder
from alignrec.graph.negatives import Positives, draw_negatives

# Negatives drawn at once: enough to hide the cost of calls, few enough for the processor's cache.
_BLOCK_TRIPLES = 16_384


@dataclasses.dataclass(frozen=True)
class Distinct:
    """The distinct values of a list.

    Attributes:
        ids: ascending.
        position: of each entry of the list in ``ids``.
        count: times that each occurs in the list.
    """

    ids: Int64[Tensor, " n"]
    position: Int64[Tensor, " b"]
    count: Float[Tensor, " n"]

    @classmethod
    def of(cls, values: Int64[Tensor, " b"]) -> "Distinct":
        """Find the distinct values."""
        ids, position, count = torch.unique(values, return_inverse=True, return_counts=True)
        return cls(ids, position, count.float())


@dataclasses.dataclass(frozen=True)
class Triples:
    """Users with an item of theirs and an item that is not."""

    user: Int64[Tensor, " b"]
    positive: Int64[Tensor, " b"]
    negative: Int64[Tensor, " b"]

    def to(self, device: torch.device) -> "Triples":
        """Return the same triples on another device."""
        return type(self)(self.user.to(device), self.positive.to(device), self.negative.to(device))


class TripleSchedule:
    """The steps of any epoch over interactions that are all in this process."""

    def __init__(self, train: CSR, *, batch_size: int, seed: int) -> None:
        self._user, self._item = train.rows, train.columns
        self._positives = Positives.indexed(train.row_offsets, train.columns, train.num_cols)
        self._candidates = torch.unique(train.columns)
        self._seed = seed
        self.num_steps = math.ceil(len(train.columns) / batch_size)
        self._order = TripleOrder(self._user, self._item, seed=seed, num_steps=self.num_steps)

    def epoch(self, epoch: int, *, first_step: int = 0) -> Iterator[Triples]:
        """Yield the triples of each step from ``first_step`` on; a step may be empty.

        Negatives are drawn for many steps at once: by the step, calls would cost more than work.
        """
        self._order.start(epoch, first_step)
        waiting: list[Tensor] = []
        for positions in self._order.positions():
            waiting.append(positions)
            if sum(map(len, waiting)) >= _BLOCK_TRIPLES:
                yield from self._triples(waiting, epoch)
                waiting = []
        if waiting:
            yield from self._triples(waiting, epoch)

    def _triples(self, steps: list[Tensor], epoch: int) -> Sequence[Triples]:
        """Return the triples of some steps."""
        chosen = torch.cat(steps)
        user, item = self._user[chosen], self._item[chosen]
        negative = draw_negatives(
            user,
            item,
            rows=user,
            positives=self._positives,
            candidates=self._candidates,
            seed=self._seed,
            epoch=epoch,
        ).squeeze(1)
        sizes = [len(positions) for positions in steps]
        parts = [torch.split(column, sizes) for column in (user, item, negative)]
        return [Triples(*step) for step in zip(*parts, strict=True)]
