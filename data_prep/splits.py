"""Interactions of whole users in, a split for each out (core -> interactions).

The random split goes by the rank of hash(seed, user key, item key) among the interactions that are
left of a user: neither the order of the log, nor numbers, nor who does the work changes it. Another
set of interactions does: one that is new or gone moves some others of its user.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from alignrec.data.schema import SPLITS
from alignrec.errors import UserError
from data_prep.config import SplitConfig
from data_prep.hashing import Hashes, hash_pairs
from data_prep.values import Ints

TRAIN, VALID, TEST = range(3)
Labels = npt.NDArray[np.int8]
_FEW = 10  # users with fewer interactions hold out one for valid and one for test
_FEWEST = 3  # users with fewer interactions hold out none
_ROUNDING = 1e-9  # 0.2 * 15 is a little above 3, 0.7 * 10 a little below 7


@dataclasses.dataclass(frozen=True)
class Histories:
    """All interactions of some users.

    Attributes:
        user: (n,) any numbers from 0.
        user_hash: (n,) of the user's key.
        item_hash: (n,) of the item's key.
        time: (n,) seconds; only read by the strategies that need times.
    """

    user: npt.NDArray[np.integer]
    user_hash: Hashes
    item_hash: Hashes
    time: Ints


@dataclasses.dataclass(frozen=True)
class Cuts:
    """The moments after which interactions are for valid, and for test (None: none are)."""

    valid: int | None
    test: int | None


def split(histories: Histories, config: SplitConfig, cuts: Cuts | None) -> Labels:
    """Return TRAIN, VALID or TEST for every interaction.

    Args:
        histories: distinct pairs.
        config: strategy, share held out, seed.
        cuts: for the strategy global_time, see ``cut_ranks``.
    """
    if cuts is not None:
        return by_cuts(histories.time, cuts)
    if config.strategy == "user_random":
        priority = hash_pairs(histories.user_hash, histories.item_hash, seed=config.seed)
    else:
        priority = ordered_bits(histories.time)
    num = np.bincount(histories.user)
    last_out = config.strategy == "user_last_out"
    valid, test = held_out_sizes(num, held_out=None if last_out else config.held_out)
    return by_priority(histories.user, histories.item_hash, priority, valid=valid, test=test)


def held_out_sizes(num: Ints, *, held_out: float | None) -> tuple[Ints, Ints]:
    """Return the sizes of valid and test for users with ``num`` interactions.

    n < 3: none. n < 10: one each. Else floor(held_out n), of which floor(half) is valid and the
    rest test (MMRec's rule with held_out = 0.2). None: one each for all n >= 3.
    """
    share = 0.0 if held_out is None else held_out
    both = np.floor(num * share + _ROUNDING).astype(np.int64)
    few = (num < _FEW) | (held_out is None)
    valid = np.where(few, 1, both // 2)
    test = np.where(few, 1, both - both // 2)
    return np.where(num < _FEWEST, 0, valid), np.where(num < _FEWEST, 0, test)


def by_priority(
    user: npt.NDArray[np.integer], tie: Hashes, priority: Hashes, *, valid: Ints, test: Ints
) -> Labels:
    """Label each user's interactions by rising priority: train, then valid, then test.

    Args:
        user: (n,) user numbers.
        tie: (n,) decides between equal priorities.
        priority: (n,) e.g. times.
        valid: (num_users,) how many of a user's interactions are for validation.
        test: (num_users,) how many are for the test.
    """
    order = np.lexsort((tie, priority, user))
    num = np.bincount(user, minlength=len(valid))
    start = np.cumsum(num) - num
    of_user = user[order]
    from_end = num[of_user] - (np.arange(len(order)) - start[of_user])  # 1 for the last
    labels = np.full(len(order), TRAIN, dtype=np.int8)
    labels[from_end <= (test + valid)[of_user]] = VALID
    labels[from_end <= test[of_user]] = TEST
    result = np.empty_like(labels)
    result[order] = labels
    return result


def cut_ranks(num_rows: int, *, held_out: float) -> tuple[int | None, int | None]:
    """Return the places, in the order of time, of the last row for training and for validation.

    Rows later than them are for validation and test. Rows of the same second stay together, so
    shares are met up to ties. None: nothing is held out.
    """
    both = int(np.floor(num_rows * held_out + _ROUNDING))
    valid, test = (num_rows - size - 1 if size else None for size in (both, both - both // 2))
    return valid, test


def by_cuts(time: Ints, cuts: Cuts) -> Labels:
    """Label by two moments, so that train is before valid is before test."""
    labels = np.full(len(time), TRAIN, dtype=np.int8)
    for label, cut in ((VALID, cuts.valid), (TEST, cuts.test)):
        if cut is not None:
            labels[time > cut] = label
    return labels


def ordered_bits(values: Ints) -> Hashes:
    """Return int64 as uint64 in the same order."""
    return values.view(np.uint64) ^ np.uint64(1 << 63)


def check_leakage(user: Ints, item: Ints, labels: npt.NDArray[np.integer]) -> None:
    """Make sure that no (user, item) is in two splits, or twice in one.

    Args:
        user: (n,) sorted by user and then item: all interactions of these users.
        item: (n,)
        labels: (n,) split of each.

    Raises:
        UserError: naming a pair and its splits.
    """
    leaks = np.flatnonzero((user[1:] == user[:-1]) & (item[1:] == item[:-1]))
    if len(leaks):
        first = leaks[0]
        names = " and ".join(SPLITS[label] for label in sorted(labels[first : first + 2]))
        raise UserError(
            f"{len(leaks):,} interactions occur more than once over the splits, for example user "
            f"{user[first]}, item {item[first]} in {names}: the test would know its answers. "
            f"Correct the split labels."
        )
