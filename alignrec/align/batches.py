"""Triples of each step in full-graph mode (training interactions -> losses).

Order and negatives are those of ``alignrec.graph``'s loaders: a step consists of the interactions
whose hash of (seed, epoch, user, item) lies in the step's share of the hash's range. So both modes
train on the same triples, and a resume needs no state but (epoch, step).
"""

import dataclasses
from typing import Self

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from alignrec.data.csr import CSR


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
    def of(cls, values: Int64[Tensor, " b"]) -> Self:
        """Find the distinct values."""
        ids, position, count = torch.unique(values, return_inverse=True, return_counts=True)
        return cls(ids, position, count.float())


@dataclasses.dataclass(frozen=True)
class Triples:
    """Users with an item of theirs and an item that is not."""

    user: Int64[Tensor, " b"]
    positive: Int64[Tensor, " b"]
    negative: Int64[Tensor, " b"]

    def to(self, device: torch.device) -> Self:
        """Return the same triples on another device."""
        return type(self)(self.user.to(device), self.positive.to(device), self.negative.to(device))


class TripleSchedule:
    """All steps of any epoch over interactions that fit in this process."""

    def __init__(self, train: CSR, *, batch_size: int, seed: int) -> None:
        self._train = train
        self._seed = seed
        self.num_steps = -(-len(train.columns) // batch_size)
        self._epoch = -1

    def step(self, epoch: int, step: int) -> Triples:
        """Return the triples of one step; a step may be empty."""
        if epoch != self._epoch:
            self._draw(epoch)
        chosen = slice(int(self._bounds[step]), int(self._bounds[step + 1]))
        return Triples(self._user[chosen], self._positive[chosen], self._negative[chosen])

    def _draw(self, epoch: int) -> None:
        g = torch.Generator().manual_seed(self._seed * 100003 + epoch)
        user, item = self._train.rows, self._train.columns
        order = torch.randperm(len(item), generator=g)
        n = len(item)
        self._bounds = (torch.arange(self.num_steps + 1) * n) // self.num_steps
        self._user, self._positive = user[order], item[order]
        cand = torch.unique(item)
        neg = cand[torch.randint(len(cand), (n,), generator=g)]
        for _ in range(50):
            bad = self._train.contains_pairs(self._user, neg).nonzero().squeeze(1)
            if not len(bad):
                break
            neg[bad] = cand[torch.randint(len(cand), (len(bad),), generator=g)]
        self._negative = neg
        self._epoch = epoch
