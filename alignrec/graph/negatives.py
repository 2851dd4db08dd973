"""Items that a user has not interacted with, drawn at random (triples of both training modes)."""

import dataclasses
import functools

import torch
from jaxtyping import Bool, Int, Int64, UInt8
from torch import Tensor

from alignrec.errors import UserError
from alignrec.graph.hashing import hash_ids, salt, uniform_below

_STREAM = 0x4E4547
_MAX_DRAWS = 128
# Up to this many (row, item) pairs there is a bit for each of them: 128 MiB.
_MAX_BITS = 2**30


@dataclasses.dataclass(frozen=True)
class Positives:
    """Each user's training items, as sorted lists.

    Attributes:
        indptr: the list of row r lies at ``indptr[r]`` .. ``indptr[r + 1]``.
        items: item_index, ascending in each list.
        bitmap: a bit for each (row, item), eight to a byte, or None: the lists are searched.
        width: items of a row of ``bitmap``.
    """

    indptr: Int64[Tensor, " rows_plus_1"]
    items: Int[Tensor, " num_edges"]
    bitmap: UInt8[Tensor, " bytes"] | None = None
    width: int = 0

    @classmethod
    def indexed(
        cls, indptr: Int64[Tensor, " rows_plus_1"], items: Int[Tensor, " num_edges"], num_items: int
    ) -> "Positives":
        """Build with a bitmap, where that is small enough."""
        num_rows = len(indptr) - 1
        if num_rows * num_items > _MAX_BITS:
            return cls(indptr, items)
        rows = torch.arange(num_rows, device=indptr.device).repeat_interleave(indptr.diff())
        pairs = rows * num_items + items
        bits = torch.zeros(num_rows * num_items // 8 + 1, dtype=torch.uint8, device=indptr.device)
        # Every pair occurs once, so adding bits is setting them.
        bits.index_add_(0, pairs >> 3, (1 << (pairs & 7)).to(torch.uint8))
        return cls(indptr, items, bits, num_items)

    def contains(self, rows: Int64[Tensor, " n"], items: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell for each (row, item) whether the item is in the row's list."""
        if self.bitmap is None:
            return self._found(rows, items)
        pairs = rows * self.width + items
        return (self.bitmap.index_select(0, pairs >> 3) >> (pairs & 7)) & 1 != 0

    @functools.cached_property
    def longest(self) -> int:
        """Items in the longest list."""
        return int(self.indptr.diff().max()) if len(self.indptr) > 1 else 0

    def _found(self, rows: Tensor, items: Tensor) -> Tensor:
        """Look by bisection."""
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
    _check_choice(users, rows, positives, len(candidates))
    pairs = hash_ids(items, hash_ids(users, salt(seed, epoch, _STREAM)))
    slots = torch.arange(num_negatives, device=users.device)
    identities = hash_ids(pairs[:, None] + slots, salt(_STREAM)).ravel()
    if num_negatives > 1:
        rows = rows.repeat_interleave(num_negatives)
    result, taken = _draw(identities, rows, positives, candidates, draw=0)
    pending = taken.nonzero().squeeze(1)
    for draw in range(1, _MAX_DRAWS):
        if len(pending) == 0:
            return result.view(-1, num_negatives)
        drawn, taken = _draw(identities[pending], rows[pending], positives, candidates, draw=draw)
        result[pending] = drawn
        pending = pending[taken]
    for place in pending.tolist():  # users with nearly all candidates: list what is left
        result[place] = _pick_free(int(rows[place]), identities[place], positives, candidates)
    return result.view(-1, num_negatives)


def _draw(
    identities: Tensor, rows: Tensor, positives: Positives, candidates: Tensor, *, draw: int
) -> tuple[Tensor, Tensor]:
    """Return a candidate for each, and which of them are positives."""
    places = uniform_below(hash_ids(identities, salt(draw)), len(candidates))
    drawn = candidates.index_select(0, places).to(torch.int64)
    return drawn, positives.contains(rows, drawn)


def _check_choice(users: Tensor, rows: Tensor, positives: Positives, num_candidates: int) -> None:
    if positives.longest < num_candidates:
        return
    everything = positives.indptr[rows + 1] - positives.indptr[rows] >= num_candidates
    if bool(everything.any()):
        raise UserError(
            f"user_index {int(users[everything][0])} has interacted with all {num_candidates} "
            f"items that occur in training, so there is no item that the user does not prefer. "
            f"Remove such users in data_prep, or add items."
        )


def _pick_free(row: int, identity: Tensor, positives: Positives, candidates: Tensor) -> Tensor:
    own = positives.items[positives.indptr[row] : positives.indptr[row + 1]]
    free = candidates[~torch.isin(candidates, own)]
    return free[uniform_below(identity, len(free))]
