"""Splits: the rule per user, what the random one depends on, and the check for leaks."""

import math

import numpy as np
import pytest

from alignrec.errors import UserError
from data_prep import splits
from data_prep.config import SplitConfig
from data_prep.interactions import Log


def make_log(sizes: list[int], *, seed: int = 0, num_items: int = 60) -> Log:
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(len(sizes)), sizes)
    item = np.concatenate([rng.permutation(num_items)[:n] for n in sizes])
    time = rng.integers(1000, 1040, len(user))  # with many ties
    order = rng.permutation(len(user))
    rating = np.full(len(user), np.nan, dtype=np.float32)
    return Log(user, item, rating, time, np.ones(len(user), dtype=bool)).select(order)


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
    log = make_log(sizes)
    labels = splits.split(log, SplitConfig(strategy=strategy))
    for user, n in enumerate(sizes):
        counts = np.bincount(labels[log.user == user], minlength=3)
        assert tuple(counts) == paper_sizes(n)


def test_random_split_is_a_function_of_seed_user_index_and_item_index() -> None:
    log = make_log([12] * 20)
    order = np.random.default_rng(5).permutation(len(log))
    labels = splits.split(log, SplitConfig())
    assert (splits.split(log.select(order), SplitConfig()) == labels[order]).all()


def test_random_split_depends_on_the_seed_and_is_uniform() -> None:
    log = make_log([50] * 200)
    labels = splits.split(log, SplitConfig(seed=1))
    assert (labels != splits.split(log, SplitConfig(seed=2))).mean() > 0.2
    # Every item is held out about equally often: 200 users x 10/60 expected, 5 sigma.
    held_out = np.bincount(log.item[labels != splits.TRAIN], minlength=60)
    expected = 200 * 10 / 60
    assert abs(held_out - expected).max() < 5 * math.sqrt(expected)


def test_time_split_holds_out_each_users_newest() -> None:
    log = make_log([20, 7, 33])
    labels = splits.split(log, SplitConfig(strategy="user_time"))
    for user in range(3):
        of_user = log.user == user
        for earlier, later in ((splits.TRAIN, splits.VALID), (splits.VALID, splits.TEST)):
            assert (
                log.timestamp[of_user & (labels == earlier)].max()
                <= log.timestamp[of_user & (labels == later)].min()
            )


def test_last_out_takes_one_each_whatever_the_size() -> None:
    log = make_log([2, 3, 20, 50])
    labels = splits.split(log, SplitConfig(strategy="user_last_out"))
    for user, expected in enumerate([(2, 0, 0), (1, 1, 1), (18, 1, 1), (48, 1, 1)]):
        assert tuple(np.bincount(labels[log.user == user], minlength=3)) == expected


def test_global_time_divides_at_two_moments() -> None:
    log = make_log([40] * 20)
    labels = splits.split(log, SplitConfig(strategy="global_time"))
    train, valid, test = (log.timestamp[labels == label] for label in range(3))
    assert train.max() < valid.min()
    assert valid.max() < test.min()
    assert len(train) >= 0.8 * len(log)
    assert len(test)


def test_a_planted_leak_is_found() -> None:
    clean = {
        "train": (np.array([0, 0, 1]), np.array([0, 1, 0])),
        "valid": (np.array([1]), np.array([1])),
        "test": (np.array([0]), np.array([2])),
    }
    splits.check_leakage(clean)
    leaking = {**clean, "test": (np.array([0]), np.array([1]))}
    with pytest.raises(UserError, match=r"user 0, item 1 in train and test"):
        splits.check_leakage(leaking)
