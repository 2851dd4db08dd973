"""Order of training interactions and prefetching."""

import contextlib
import math
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from alignrec.graph.loader import TripleOrder, prefetch


def interactions(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.arange(n) // 7, torch.arange(n) % 7


@pytest.mark.parametrize("num_steps", [1, 3, 40])
def test_every_interaction_once_an_epoch(num_steps: int) -> None:
    users, items = interactions(200)
    order = TripleOrder(users, items, seed=0, num_steps=num_steps)
    counts = order.start(4, 0)
    steps = list(order)
    assert [len(step) for step in steps] == counts.tolist()
    assert len(steps) == len(order) == num_steps
    assert sorted(place for step in steps for place in step) == list(range(200))


def test_step_does_not_depend_on_who_holds_the_interaction() -> None:
    """Splitting the users over ranks splits each step's interactions."""
    users, items = interactions(300)
    whole = TripleOrder(users, items, seed=1, num_steps=6)
    whole.start(2, 0)
    expected = [{(int(users[p]), int(items[p])) for p in step} for step in whole]
    found: list[set[tuple[int, int]]] = [set() for _ in range(6)]
    for rank in range(3):
        own = users % 3 == rank
        part = TripleOrder(users[own], items[own], seed=1, num_steps=6)
        part.start(2, 0)
        for step, places in enumerate(part):
            found[step] |= {(int(users[own][p]), int(items[own][p])) for p in places}
    assert found == expected


def test_epochs_are_shuffled_independently() -> None:
    """Of the first half of one epoch, half lies in the first half of the next."""
    users, items = interactions(10_000)
    order = TripleOrder(users, items, seed=0, num_steps=2)
    halves = []
    for epoch in range(2):
        order.start(epoch, 0)
        halves.append(set(next(iter(order))))
    assert abs(len(halves[0]) - 5000) < 5 * math.sqrt(2500)
    assert abs(len(halves[0] & halves[1]) - 2500) < 5 * math.sqrt(10_000 * 3 / 16)


def counting(made: list[int], total: int = 100) -> Iterator[Any]:
    for number in range(total):
        made.append(number)
        yield number


def test_prefetch_yields_everything_in_order() -> None:
    assert list(prefetch(counting([], 20), depth=3)) == list(range(20))


def test_prefetch_of_nothing() -> None:
    assert list(prefetch(counting([], 0), depth=3)) == []


@pytest.mark.parametrize("stop_after", [1, 2, 7])
def test_stopping_early_leaves_a_fixed_number_made(stop_after: int) -> None:
    """Ranks that stop after the same batch have made the same number of collective calls."""
    made: list[int] = []
    with contextlib.closing(prefetch(counting(made), depth=3)) as batches:
        for number in batches:
            if number == stop_after - 1:
                break
    assert len(made) == stop_after - 1 + 3
    assert threading.active_count() == 1 or all(
        thread.name != "prefetch" for thread in threading.enumerate()
    )


def test_errors_of_the_thread_reach_the_consumer() -> None:
    def failing() -> Iterator[Any]:
        yield 1
        raise ValueError("no more")

    batches = prefetch(failing(), depth=2)
    assert next(batches) == 1
    with pytest.raises(ValueError, match="no more"):
        next(batches)
