"""Items that a user has not interacted with, drawn at random (triples of both training modes).

Draws are made in the host's memory by NumPy, whose 64-bit integer arithmetic is vectorised and
writes in place; a block of them stays in the processor's cache.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int, Int64, UInt8
from torch import Tensor

from alignrec.errors import UserError
from alignrec.graph.hashing import GOLDEN, finalize_in_place, salt

_STREAM = 0x4E4547
# Keys of a slot: the first draw, 128 more for what is rejected, some at once, and the last resort.
_AT_ONCE = 2
_KEYS = 1 + 64 * _AT_ONCE + 1
_HALF_WORD = np.int64(32)
_GOLDEN = np.uint64(GOLDEN)
# Up to this many (row, item) pairs there is a bit for each of them: 128 MiB.
_MAX_BITS = 2**30
# Triples that are worked on at once: few enough for the cache, enough that calls cost nothing.
_BLOCK = 65_536

Integers = npt.NDArray[np.integer[Any]]
Indices = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True)
class Positives:
    """Each user's training items, as sorted lists in the host's memory.

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
        rows = torch.arange(num_rows).repeat_interleave(indptr.diff())
        pairs = rows * num_items + items
        bits = torch.zeros(num_rows * num_items // 8 + 1, dtype=torch.uint8)
        # Every pair occurs once, so adding bits is setting them.
        bits.index_add_(0, pairs >> 3, (1 << (pairs & 7)).to(torch.uint8))
        return cls(indptr, items, bits, num_items)

    def contains(self, rows: Int64[Tensor, " n"], items: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell for each (row, item) whether the item is in the row's list."""
        return torch.from_numpy(self.lookup(rows.numpy(), items.to(torch.int64).numpy()))

    def lookup(self, rows: Indices, items: Indices) -> npt.NDArray[np.bool_]:
        """Do what ``contains`` does, on arrays."""
        if self._bytes is None:
            return self._found(torch.from_numpy(rows), torch.from_numpy(items)).numpy()
        pairs = rows * self.width
        pairs += items
        place = pairs.astype(np.uint8)
        place &= 7
        pairs >>= 3
        bits = self._bytes.take(pairs)
        bits >>= place
        bits &= 1
        return bits.view(np.bool_)

    @functools.cached_property
    def longest(self) -> int:
        """Items in the longest list."""
        return int(self.indptr.diff().max()) if len(self.indptr) > 1 else 0

    @functools.cached_property
    def _bytes(self) -> npt.NDArray[np.uint8] | None:
        return None if self.bitmap is None else self.bitmap.numpy()

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
        users: user_index of each training interaction, below 2**32.
        items: item_index of it, below 2**32.
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
    drawer = _Drawer(positives, candidates.numpy(), salt(seed, epoch, _STREAM))
    result = np.empty((len(users), num_negatives), dtype=np.int64)
    for slot in range(num_negatives):
        drawer.fill(result[:, slot], users.numpy(), items.numpy(), rows.numpy(), slot)
    return torch.from_numpy(result)


class _Drawer:
    """Draws of one epoch."""

    def __init__(self, positives: Positives, candidates: Integers, key: int) -> None:
        self._positives = positives
        self._candidates = candidates
        # of consecutive candidates, which need no table
        consecutive = len(candidates) and int(candidates[-1] - candidates[0]) < len(candidates)
        self._first = int(candidates[0]) if consecutive else None
        self._key = np.int64(key).view(np.uint64)

    def fill(
        self, result: Indices, users: Integers, items: Integers, rows: Indices, slot: int
    ) -> None:
        """Draw one item for each interaction into ``result``."""
        keys = self._keys(slot)
        pending = self._draw_all(result, users, items, rows, keys[:1])
        for draw in range(1, _KEYS - 1, _AT_ONCE):
            if not len(pending):
                return
            pairs = _pairs(users[pending], items[pending])[:, None]
            drawn = self._draw(pairs ^ keys[draw : draw + _AT_ONCE])  # (pending, draws)
            asked = np.repeat(rows[pending], drawn.shape[1])
            taken = self._positives.lookup(asked, drawn.ravel()).reshape(drawn.shape)
            chosen = np.arange(len(pending)), taken.argmin(axis=1)  # the first that is none
            result[pending] = drawn[chosen]
            pending = pending[taken[chosen]]
        for place in pending.tolist():  # users with nearly all candidates: list what is left
            one = slice(place, place + 1)
            hashes = finalize_in_place(_pairs(users[one], items[one]) ^ keys[-1:])
            result[place] = self._pick_free(int(rows[place]), hashes)

    def _draw_all(
        self, result: Indices, users: Integers, items: Integers, rows: Indices, key: Words
    ) -> Indices:
        """Draw one item for each interaction and return the places of those that are positives."""
        places = [np.empty(0, dtype=np.int64)]
        for first in range(0, len(users), _BLOCK):
            block = slice(first, first + _BLOCK)
            drawn = result[block]
            words = _pairs(users[block], items[block], out=drawn)
            words ^= key
            self._draw(words)
            (taken,) = self._positives.lookup(rows[block], drawn).nonzero()
            places.append(taken + first)
        return np.concatenate(places)

    def _keys(self, slot: int) -> Words:
        """Return the key of each draw for a slot."""
        numbers = np.arange(slot * _KEYS, (slot + 1) * _KEYS, dtype=np.uint64)
        numbers *= _GOLDEN
        numbers += self._key
        return finalize_in_place(numbers)

    def _draw(self, words: Words) -> Indices:
        """Turn each word, a number of (user, item) and key, into an item, in place."""
        places = uniform_places(finalize_in_place(words), len(self._candidates))
        if self._first is None:
            places[...] = self._candidates.take(places)
        elif self._first:
            places += self._first
        return places

    def _pick_free(self, row: int, hashes: Words) -> int:
        first, last = (int(self._positives.indptr[r]) for r in (row, row + 1))
        free = np.setdiff1d(self._candidates, self._positives.items[first:last].numpy())
        return int(free[uniform_places(hashes, len(free))[0]])


def uniform_places(hashes: Words, count: int) -> Indices:
    """Map hashes to 0 .. count - 1 by multiplication and shift, in place.

    As many leading bits are multiplied as leave room for the product in 64 bits, so the chances
    of two places differ by less than count / 2**(64 - bits of count): a thousandth at 100 million.
    """
    bits = 64 - count.bit_length()
    hashes >>= np.uint64(64 - bits)
    hashes *= np.uint64(count)
    hashes >>= np.uint64(bits)
    return hashes.view(np.int64)


def _pairs(users: Integers, items: Integers, out: Indices | None = None) -> Words:
    """Return a number for each (user, item), another one for another pair."""
    pairs = np.left_shift(users, _HALF_WORD, out=out)
    pairs |= items
    return pairs.view(np.uint64)


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
