"""Items that a user has not interacted with, drawn at random (triples of both training modes)."""

import dataclasses

import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor

from alignrec.errors import UserError
from alignrec.graph.hashing import hash_ids, salt, uniform_below

_STREAM = 0x4E4547
_MAX_DRAWS = 128


@dataclasses.dataclass(frozen=True)
class Positives:
    """Each user's training items, as sorted lists.

    Attributes:
        indptr: the list of row r lies at ``indptr[r]`` .. ``indptr[r + 1]``.
        items: item_index, ascending in each list.
    """

    indptr: Int64[Tensor, " rows_plus_1"]
    items: Int[Tensor, " num_edges"]

    def contains(self, rows: Int64[Tensor, " n"], items: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell for each (row, item) whether the item is in the row's list, by bisection."""
        if len(self.items) == 0:
            return torch.zeros_like(rows, dtype=torch.bool)
        low, end = self.indptr[rows], self.indptr[rows + 1]
        high = end
        longest = int((end - low).max()) if len(rows) else 0
        last = len(self.items) - 1
        for _ in range(longest.bit_length()):
            middle = (low + high) // 2
            smaller = (middle < high) & (self.items[middle.clamp_max(last)] < items)
            low = torch.where(smaller, middle + 1, low)
            high = torch.where(smaller, high, middle)
        return (low < end) & (self.items[low.clamp_max(last)] == items)


def draw_negatives(
    users: Int64[Tensor, " batch"],
    items: Int64[Tensor, " batch"],
    *,
    rows: Int64[Tensor, " batch"],
    positives: Positives,
    candidates: Int[Tensor, " num_candidates"],
    seed: int,
    epoch: int,
    num_negatives: int = 1,
) -> Int64[Tensor, "batch num_negatives"]:
    """Draw items uniformly from the candidates that are none of the user's positives.

    The draw is a function of (seed, epoch, user, item, slot): the same on any rank, in any batch.

    Args:
        users: user_index of each training interaction.
        items: item_index of it.
        rows: the user's row in ``positives``; with all users there, ``users`` itself.
        positives: training items of the users.
        candidates: items that occur in training, ascending.
        seed: of the run.
        epoch: counted from 0.
        num_negatives: draws for each interaction.

    Raises:
        UserError: a user has interacted with every candidate.
    """
    lengths = positives.indptr[rows + 1] - positives.indptr[rows]
    if bool((lengths >= len(candidates)).any()):
        user = int(users[lengths >= len(candidates)][0])
        raise UserError(
            f"user_index {user} has interacted with all {len(candidates)} items that occur in "
            f"training, so there is no item that the user does not prefer. Remove such users in "
            f"data_prep, or add items."
        )
    pairs = hash_ids(items, hash_ids(users, salt(seed, epoch, _STREAM)))
    slots = torch.arange(num_negatives, device=users.device)
    identities = hash_ids(pairs[:, None] + slots, salt(_STREAM)).ravel()
    rows = rows.repeat_interleave(num_negatives)
    result = torch.empty_like(identities)
    pending = torch.arange(len(identities), device=users.device)
    for draw in range(_MAX_DRAWS):
        places = uniform_below(hash_ids(identities[pending], salt(draw)), len(candidates))
        drawn = candidates[places].to(torch.int64)
        result[pending] = drawn
        pending = pending[positives.contains(rows[pending], drawn)]
        if len(pending) == 0:
            return result.view(-1, num_negatives)
    for place in pending.tolist():  # users with nearly all candidates: list what is left
        result[place] = _pick_free(int(rows[place]), identities[place], positives, candidates)
    return result.view(-1, num_negatives)


def _pick_free(row: int, identity: Tensor, positives: Positives, candidates: Tensor) -> Tensor:
    own = positives.items[positives.indptr[row] : positives.indptr[row + 1]]
    free = candidates[~torch.isin(candidates, own)]
    return free[uniform_below(identity, len(free))]
