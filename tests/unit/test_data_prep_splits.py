"""Splits: the rule per user, what the random one depends on, and the check for leaks."""

import math

import numpy as np
import pytest

from alignrec.errors import UserError
from data_prep import splits
from data_prep.config import SplitConfig
from data_prep.hashing import splitmix64
from data_prep.splits import Cuts, Histories

NUM_ITEMS = 60
ITEM_HASHES = splitmix64(np.arange(NUM_ITEMS, dtype=np.uint64))


def make_histories(sizes: list[int], *, seed: int = 0) -> tuple[Histories, np.ndarray]:
    """Return users' histories in random order, and their items."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(sizes)), sizes)
    item = np.concatenate([rng.permutation(NUM_ITEMS)[:n] for n in sizes])
    time = rng.integers(1000, 1040, len(user)) - 1020  # with many ties
    user_hash = splitmix64(user.astype(np.uint64) + np.uint64(1000))
    histories = Histories(user, user_hash, ITEM_HASHES[item], time)
    order = rng.permutation(len(user))
    return select(histories, order), item[order]


def select(histories: Histories, rows: np.ndarray) -> Histories:
    return Histories(
        histories.user[rows], histories.user_hash[rows], histories.item_hash[rows],
        histories.time[rows],
    )  # fmt: skip


def split(histories: Histories, **settings: object) -> np.ndarray:
    return splits.split(histories, SplitConfig(**settings), None)


def paper_sizes(n: int) -> tuple[int, int, int]:
    if n < 3:
        return n, 0, 0
    if n < 10:
        return n - 2, 1, 1
    both = math.floor(0.2 * n)
    return n - both, both // 2, both - both // 2


@pytest.mark.parametrize("strategy", ["user_random", "user_time"])
def test_sizes_follow_the_published_rule_for_every_user(strategy: str) -> None:
    sizes = list(range(1, 58))
    histories, _ = make_histories(sizes)
    labels = split(histories, strategy=strategy)
    for user, n in enumerate(sizes):
        counts = np.bincount(labels[histories.user == user], minlength=3)
        assert tuple(counts) == paper_sizes(n)


@pytest.mark.parametrize("strategy", ["user_random", "user_time", "user_last_out"])
def test_a_split_depends_neither_on_order_nor_on_numbers(strategy: str) -> None:
    histories, _ = make_histories([12] * 20)
    labels = split(histories, strategy=strategy)
    order = np.random.default_rng(5).permutation(len(labels))
    other = select(histories, order)
    renumbered = Histories(19 - other.user, other.user_hash, other.item_hash, other.time)
    assert (split(renumbered, strategy=strategy) == labels[order]).all()


def test_random_split_of_a_user_does_not_depend_on_others() -> None:
    histories, _ = make_histories([12] * 20)
    labels = split(histories)
    few = histories.user < 5
    assert (split(select(histories, few)) == labels[few]).all()


def test_random_split_depends_on_the_seed_and_is_uniform() -> None:
    histories, item = make_histories([50] * 200)
    labels = split(histories, seed=1)
    assert (labels != split(histories, seed=2)).mean() > 0.2
    # Every item is held out about equally often: 200 users x 10/60 expected, 5 sigma.
    held_out = np.bincount(item[labels != splits.TRAIN], minlength=NUM_ITEMS)
    expected = 200 * 10 / NUM_ITEMS
    assert abs(held_out - expected).max() < 5 * math.sqrt(expected)


def test_time_split_holds_out_each_users_newest() -> None:
    histories, _ = make_histories([20, 7, 33])
    labels = split(histories, strategy="user_time")
    for user in range(3):
        of_user = histories.user == user
        for earlier, later in ((splits.TRAIN, splits.VALID), (splits.VALID, splits.TEST)):
            assert (
                histories.time[of_user & (labels == earlier)].max()
                <= histories.time[of_user & (labels == later)].min()
            )


def test_last_out_takes_one_each_whatever_the_size() -> None:
    histories, _ = make_histories([2, 3, 20, 50])
    labels = split(histories, strategy="user_last_out")
    for user, expected in enumerate([(2, 0, 0), (1, 1, 1), (18, 1, 1), (48, 1, 1)]):
        assert tuple(np.bincount(labels[histories.user == user], minlength=3)) == expected


def test_global_time_divides_at_two_moments() -> None:
    time = np.random.default_rng(0).integers(-500, 500, 800)
    ranks = splits.cut_ranks(len(time), held_out=0.2)
    ordered = np.sort(time)
    labels = splits.by_cuts(time, Cuts(*(int(ordered[rank]) for rank in ranks)))
    train, valid, test = (time[labels == label] for label in range(3))
    assert train.max() < valid.min()
    assert valid.max() < test.min()
    assert len(train) >= 0.8 * len(time)
    assert 0 < len(test) <= 0.1 * len(time)


def test_nothing_held_out_is_all_train() -> None:
    ranks = splits.cut_ranks(100, held_out=0.0)
    assert ranks == (None, None)
    assert (splits.by_cuts(np.arange(100), Cuts(*ranks)) == splits.TRAIN).all()


def test_times_keep_their_order_as_bits() -> None:
    times = np.array([-(2**63), -5, -1, 0, 1, 2**62])
    assert (np.diff(splits.ordered_bits(times).astype(object)) > 0).all()


def test_a_planted_leak_is_found() -> None:
    user, item = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    splits.check_leakage(user, item, np.array([0, 2, 0, 1]))
    with pytest.raises(UserError, match=r"1 interactions .* user 1, item 0 in train and test"):
        splits.check_leakage(user, np.array([0, 1, 0, 0]), np.array([0, 0, 2, 0]))
