"""Cleaned interactions in, a split for each out (interactions -> artifact).

The random split is a function of (seed, user_index, item_index) alone: the number of workers does
not change it, and a new interaction moves few others of its user. A log in another order can number
its users otherwise, and so be split otherwise.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from alignrec.data.schema import SPLITS, Split
from alignrec.errors import UserError
from data_prep.config import SplitConfig
from data_prep.interactions import Ints, Log

TRAIN, VALID, TEST = range(3)
Labels = npt.NDArray[np.int8]
_FEW = 10  # users with fewer interactions hold out one for valid and one for test
_FEWEST = 3  # users with fewer interactions hold out none
_ROUNDING = 1e-9  # 0.2 * 15 is a little above 3, 0.7 * 10 a little below 7


def split(log: Log, config: SplitConfig) -> Labels:
    """Return TRAIN, VALID or TEST for every interaction.

    Args:
        log: distinct pairs with dense user numbers.
        config: strategy, share held out, seed.
    """
    if config.strategy == "global_time":
        return global_time(log.timestamp, held_out=config.held_out)
    if config.strategy == "user_random":
        priority = pair_hash(log.user, log.item, seed=config.seed).astype(np.uint64)
    else:
        priority = (log.timestamp - log.timestamp.min(initial=0)).astype(np.uint64)
    num = np.bincount(log.user)
    last_out = config.strategy == "user_last_out"
    valid, test = held_out_sizes(num, held_out=None if last_out else config.held_out)
    return by_priority(log.user, log.item, priority, valid=valid, test=test)


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
    user: Ints, item: Ints, priority: npt.NDArray[np.uint64], *, valid: Ints, test: Ints
) -> Labels:
    """Label each user's interactions by rising priority: train, then valid, then test.

    Args:
        user: (n,) user numbers.
        item: (n,) item numbers; they decide between equal priorities.
        priority: (n,) e.g. times.
        valid: (num_users,) how many of a user's interactions are for validation.
        test: (num_users,) how many are for the test.
    """
    order = np.lexsort((item, priority, user))
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


def global_time(timestamp: Ints, *, held_out: float) -> Labels:
    """Label by two points in time, so that train is before valid is before test.

    Interactions of the same second stay together, so shares are met up to ties.
    """
    ordered = np.sort(timestamp)
    both = int(np.floor(len(ordered) * held_out + _ROUNDING))
    labels = np.full(len(timestamp), TRAIN, dtype=np.int8)
    for label, size in ((VALID, both), (TEST, both - both // 2)):
        if size:
            labels[timestamp > ordered[-size - 1]] = label
    return labels


def pair_hash(user: Ints, item: Ints, *, seed: int) -> npt.NDArray[np.uint64]:
    """Return a well-mixed 64-bit number per (seed, user, item): splitmix64, chained."""
    mixed = _splitmix64(np.full(len(user), seed, dtype=np.uint64))
    mixed = _splitmix64(mixed ^ user.astype(np.uint64))
    return _splitmix64(mixed ^ item.astype(np.uint64))


def check_leakage(pairs: Mapping[Split, tuple[Ints, Ints]]) -> None:
    """Make sure that no (user, item) is in two splits, or twice in one.

    Raises:
        UserError: naming a pair and its splits.
    """
    user = np.concatenate([pairs[split][0] for split in SPLITS])
    item = np.concatenate([pairs[split][1] for split in SPLITS])
    where = np.repeat(np.arange(len(SPLITS)), [len(pairs[split][0]) for split in SPLITS])
    order = np.lexsort((where, item, user))
    same = (user[order][1:] == user[order][:-1]) & (item[order][1:] == item[order][:-1])
    leaks = np.flatnonzero(same)
    if len(leaks):
        first, second = order[leaks[0]], order[leaks[0] + 1]
        raise UserError(
            f"{len(leaks):,} interactions occur more than once over the splits, for example user "
            f"{user[first]}, item {item[first]} in {SPLITS[where[first]]} and "
            f"{SPLITS[where[second]]}: the test would know its answers. Correct the split labels."
        )


def _splitmix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # Steele, Lea, Flood 2014; array arithmetic on uint64 wraps around, as it should.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
