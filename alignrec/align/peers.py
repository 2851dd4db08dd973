"""What the losses of one step need from the other ranks (batch shares -> global batch).

CCA compares a row with the rows of the whole batch, and REG is a norm over the whole batch; so the
ranks exchange the distinct H_id rows of one batch, and moments of size d x d, d x f and f x f. A
step then computes what one rank would compute, whatever the number of ranks.
"""

import dataclasses
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank


class Peers(Protocol):
    """The ranks that share a batch; collective."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        ...

    def gather(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], int]:
        """Return the rows of all ranks in rank order, and where this rank's begin.

        Differentiable: a row's gradient is the sum of what every rank's loss sends back.
        """
        ...

    def sum(self, value: Tensor) -> Tensor:
        """Return the sum over the ranks; the gradient goes to this rank's share unchanged.

        For a loss that every rank computes in full from the sum.
        """
        ...


class Alone:
    """The whole batch is here."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return 1

    def gather(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n d"], int]:
        """See ``Peers``."""
        return rows, 0

    def sum(self, value: Tensor) -> Tensor:
        """See ``Peers``."""
        return value


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Each rank has a share of the batch, an empty one perhaps."""

    rank: Rank
    exchange: Exchange

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.rank.world_size

    def gather(self, rows: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "m d"], int]:
        """See ``Peers``."""
        sizes = self.exchange.swap_counts([len(rows)] * self.world_size)
        everyone: Tensor = _Gather.apply(rows, self.exchange, sizes)  # type: ignore[no-untyped-call]
        return everyone, sum(sizes[: self.rank.index])

    def sum(self, value: Tensor) -> Tensor:
        """See ``Peers``."""
        total = self.exchange.sum(value.detach())
        return value + (total - value.detach())


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, rows: Tensor, exchange: Exchange, sizes: list[int]) -> Tensor:  # noqa: ANN401
        context.exchange, context.sizes, context.n = exchange, sizes, len(rows)
        copies = rows.repeat(exchange.world_size, 1)
        return exchange.all_to_all(copies, [len(rows)] * exchange.world_size, sizes)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        n, ranks = context.n, context.exchange.world_size
        arrived = context.exchange.all_to_all(gradient, context.sizes, [n] * ranks)
        return arrived.view(ranks, n, gradient.shape[1]).sum(dim=0), None, None
