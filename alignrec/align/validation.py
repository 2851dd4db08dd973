"""Validation of embeddings while they are trained (embeddings -> early stop, model selection)."""

import dataclasses
from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.evaluation import metrics
from alignrec.evaluation.ranking import rank_all
from alignrec.graph.hashing import hash_ids, salt, uniform

_BLOCKS_AT_ONCE = 8
_STREAM = 0x4A554447  # stream number of the choice of users
_PLACE_BITS = 53  # of a hash that is a place in [0, 1)
SELECTION_K = 20
SELECTION_METRIC = f"recall@{SELECTION_K}"
_METRICS: dict[str, Callable[..., Tensor]] = {
    SELECTION_METRIC: metrics.recall_at_k,
    f"ndcg@{SELECTION_K}": metrics.ndcg_at_k,
}


class Validation:
    """Full ranking of every item of the catalogue for users of the validation split.

    Attributes:
        num_users: users that are ranked, over all ranks.
    """

    def __init__(
        self,
        train: CSR,
        valid: CSR,
        *,
        choice: "Choice",
        removed: Int64[Tensor, " num_removed"],
        block_users: int,
        alive: Beat = unwatched,
    ) -> None:
        """Choose the users; collective where ``choice`` is.

        Args:
            train: training items of the users whose rows are ranked here; no candidates.
            valid: their validation items.
            choice: which of them are judged.
            removed: items that the present catalogue does not have; nobody's candidates.
            block_users: users ranked at once.
            alive: called after some blocks, so unequally often on ranks with unequally many users.
        """
        self._users = choice.among(metrics.evaluation_users(train, valid))
        self.num_users = choice.count(len(self._users))
        self._seen = train
        self._removed = removed
        self._held_out = valid.select(self._users)
        self._block_users = block_users
        self._alive = alive

    def totals(
        self, user: Float[Tensor, "num_rows d"], item: Float[Tensor, "num_items d"]
    ) -> Float64[Tensor, " metrics"]:
        """Return the number of users and the sums of their metrics; ranks' totals add up.

        Raises:
            UserError: an embedding is not finite.
        """
        count = len(self._users)
        if count == 0:
            return torch.zeros(1 + len(_METRICS), dtype=torch.float64)
        parts = torch.split(self._users, _BLOCKS_AT_ONCE * self._block_users)
        topk = torch.cat([self._rank(user, item, users) for users in parts])
        means = [metric(topk, self._held_out, k=SELECTION_K) for metric in _METRICS.values()]
        return torch.stack([torch.ones((), dtype=torch.float64), *means]) * count

    def _rank(self, user: Tensor, item: Tensor, users: Int64[Tensor, " n"]) -> Tensor:
        """Return the best items of some users."""
        best = rank_all(
            user,
            item,
            users=users,
            seen=self._seen,
            removed=self._removed,
            k=SELECTION_K,
            block_users=self._block_users,
        )
        self._alive()
        return best


def _alone(own: Tensor) -> Tensor:
    return own


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which users are judged: the same for a seed, whatever the number of ranks.

    Attributes:
        user_index: of each row that this rank has.
        limit: users over all ranks at most; None: all.
        seed: of the choice.
        total: sums numbers over the ranks, like ``Exchange.sum``.
    """

    user_index: Int64[Tensor, " num_rows"]
    limit: int | None = None
    seed: int = 0
    total: Callable[[Tensor], Tensor] = _alone

    def among(self, rows: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """Return those of some rows whose users are judged: the first by hash; collective."""
        if self.limit is None or self.count(len(rows)) <= self.limit:
            return rows
        hashes = hash_ids(self.user_index[rows], salt(self.seed, _STREAM))
        places = uniform(hashes)
        ascending = places.sort().values
        low, high = 0.0, 1.0  # not too many below low, too many below high
        for _ in range(_PLACE_BITS):
            middle = (low + high) / 2
            below = int(torch.searchsorted(ascending, middle))
            low, high = (middle, high) if self.count(below) <= self.limit else (low, middle)
        return rows[places < low]

    def count(self, number: int) -> int:
        """Return the sum of the ranks' numbers; collective."""
        return int(self.total(torch.tensor([number])))


def metrics_from(totals: Float64[Tensor, " metrics"]) -> dict[str, float]:
    """Return the mean metrics by name; ``totals`` are of one user at least."""
    return dict(zip(_METRICS, (totals[1:] / totals[0]).tolist(), strict=True))
