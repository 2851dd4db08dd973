"""Validation of embeddings while they are trained (embeddings -> early stop, model selection)."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.errors import UserError
from alignrec.evaluation import metrics
from alignrec.evaluation.ranking import rank_all

_BLOCKS_AT_ONCE = 8
SELECTION_K = 20
SELECTION_METRIC = f"recall@{SELECTION_K}"
_METRICS: dict[str, Callable[..., Tensor]] = {
    SELECTION_METRIC: metrics.recall_at_k,
    f"ndcg@{SELECTION_K}": metrics.ndcg_at_k,
}


class Validation:
    """Full ranking of every item of the catalogue for the users of the validation split.

    Args:
        train: training items of the users whose rows are ranked here; no candidates.
        valid: their validation items.
        removed: items that the present catalogue does not have; nobody's candidates.
        block_users: users ranked at once.
        alive: called after some blocks, so unequally often on ranks with unequally many users.
    """

    def __init__(
        self,
        train: CSR,
        valid: CSR,
        *,
        removed: Int64[Tensor, " num_removed"],
        block_users: int,
        alive: Beat = unwatched,
    ) -> None:
        self._users = metrics.evaluation_users(train, valid)
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


def metrics_from(totals: Float64[Tensor, " metrics"]) -> dict[str, float]:
    """Return the mean metrics by name.

    Raises:
        UserError: no user has interactions in both splits, so nothing could be selected.
    """
    if totals[0] == 0:
        raise UserError(
            "no user has interactions in both train and valid: without validation there is no best "
            "epoch. Prepare the dataset with a validation split."
        )
    return dict(zip(_METRICS, (totals[1:] / totals[0]).tolist(), strict=True))
