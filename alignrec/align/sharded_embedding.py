"""An embedding table whose rows lie with the owners of their nodes (exchange -> sampled training).

A rank keeps the rows and the Adam state of its own nodes. A step asks the owners for the rows of
its batch and sends them the gradients; the owners add up what all ranks sent and update the rows
that were asked for, and no others.
"""

import dataclasses
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from alignrec.distributed.exchange import Exchange, Route, sums_by_row

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8
_ROWS_AT_ONCE = 2048  # of an update: a block of 64 columns takes 0.5 MiB

RowsOf = Callable[[Int64[Tensor, " n"]], Int64[Tensor, " n"]]


@dataclasses.dataclass(frozen=True)
class Lookup:
    """Rows asked for in one step.

    Attributes:
        rows: aligned with the ids asked for; a leaf, which collects the gradient.
        route: the way back to the owners.
    """

    rows: Float[Tensor, "n d"]
    route: Route


class ShardedEmbedding:
    """This rank's rows of a table, and the way to the other ranks'.

    Every rank calls ``lookup`` and ``update`` equally often.

    Attributes:
        owned: global ids of this rank's rows, in their order.
        weight: this rank's rows.
    """

    def __init__(
        self,
        weight: Float[Tensor, "num_owned d"],
        *,
        owned: Int64[Tensor, " num_owned"],
        owner_of: RowsOf,
        local_rows: RowsOf,
        exchange: Exchange,
    ) -> None:
        self.owned = owned
        self.weight = weight
        self._mean = torch.zeros_like(weight)
        self._square = torch.zeros_like(weight)
        self._updates = torch.zeros(len(weight), dtype=torch.int64, device=weight.device)
        self._owner_of = owner_of
        self._local_rows = local_rows
        self._exchange = exchange

    def lookup(self, ids: Int64[Tensor, " n"]) -> Lookup:
        """Return the rows of distinct global ids; equal ids would travel twice."""
        route = self._exchange.send(ids, self._owner_of(ids))
        found = route.reply(self.weight.index_select(0, self._local_rows(route.received)))
        return Lookup(found.detach().requires_grad_(), route)

    def update(self, lookup: Lookup, *, learning_rate: float) -> None:
        """Send the gradients of a lookup to the owners, and take one step of Adam there.

        Moments and bias correction are per row, by the row's own number of updates: a row that is
        first asked for late in training starts like every other (Kingma & Ba 2015, alg. 1). Where
        all rows are asked for in every step this is Adam.
        """
        gradient = lookup.rows.grad
        sent = torch.zeros_like(lookup.rows) if gradient is None else gradient
        arrived = lookup.route.send_back(sent.detach())
        rows = self._local_rows(lookup.route.received)
        for some, total in sums_by_row(rows, arrived, at_once=_ROWS_AT_ONCE):
            self._adam(some, total, learning_rate)

    def _adam(
        self, rows: Int64[Tensor, " n"], gradient: Float[Tensor, "n d"], learning_rate: float
    ) -> None:
        """Update distinct rows."""
        updates = self._updates.index_select(0, rows).add_(1)
        mean = self._mean.index_select(0, rows).lerp_(gradient, 1 - _BETA1)
        square = self._square.index_select(0, rows).lerp_(gradient.square(), 1 - _BETA2)
        for table, values in (
            (self._updates, updates),
            (self._mean, mean),
            (self._square, square),
        ):
            table.index_copy_(0, rows, values)
        age = updates.double().unsqueeze(1)
        root = (1 - _BETA2**age).sqrt()
        scale = (root / (1 - _BETA1**age)).to(mean.dtype)
        floor = (_EPSILON * root).to(mean.dtype)
        step = mean.mul_(scale).div_(square.sqrt_().add_(floor))
        self.weight.index_add_(0, rows, step, alpha=-learning_rate)

    def state(self) -> dict[str, Tensor]:
        """Return ids, rows and optimizer state of this rank, by name."""
        return {
            "ids": self.owned,
            "weight": self.weight,
            "mean": self._mean,
            "square": self._square,
            "updates": self._updates,
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over the rows of a saved state that this rank owns; other rows are left out.

        Call it with the states of all ranks that saved some of its rows, however many they were.
        """
        mine, rows = self.placed(state["ids"])
        for name, table in self.state().items():
            if name != "ids":
                table[rows] = state[name][mine].to(table.device)

    def placed(self, ids: Int64[Tensor, " n"]) -> tuple[Bool[Tensor, " n"], Int64[Tensor, " m"]]:
        """Return which global ids this rank owns, and the rows of those."""
        mine = self._owner_of(ids) == self._exchange.rank_index
        return mine, self._local_rows(ids[mine])
