"""Negatives: never a positive, uniform over what is left, a function of the interaction alone."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from alignrec.errors import UserError
from alignrec.graph import negatives
from alignrec.graph.hashing import salt
from alignrec.graph.negatives import Positives, draw_negatives, uniform_places

WORD = 1 << 64


def random_positives(
    num_users: int, num_items: int, density: float
) -> tuple[Positives, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    liked = torch.rand(num_users, num_items, generator=generator) < density
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), liked.sum(1).cumsum(0)])
    return Positives(indptr, liked.nonzero()[:, 1].to(torch.int32)), liked


def draw(positives: Positives, liked: torch.Tensor, **changes: int) -> tuple[torch.Tensor, ...]:
    users, items = liked.nonzero().T
    values = {"seed": 1, "epoch": 0, "num_negatives": 3, **changes}
    negatives = draw_negatives(
        users,
        items,
        rows=users,
        positives=positives,
        candidates=liked.any(0).nonzero()[:, 0].to(torch.int32),
        **values,
    )
    return users, items, negatives


def test_contains_is_a_lookup() -> None:
    positives, liked = random_positives(17, 40, 0.2)
    rows, items = torch.meshgrid(torch.arange(17), torch.arange(40), indexing="ij")
    indexed = Positives.indexed(positives.indptr, positives.items, 40)
    assert indexed.bitmap is not None
    for lists in (positives, indexed):
        found = lists.contains(rows.ravel(), items.ravel())
        assert torch.equal(found.view(17, 40), liked)


def test_no_bitmap_where_it_would_be_large() -> None:
    positives, liked = random_positives(5, 40, 0.2)
    indexed = Positives.indexed(positives.indptr, positives.items, 2**29)
    assert indexed.bitmap is None
    assert indexed.contains(torch.arange(5), torch.full((5,), 3)).tolist() == liked[:, 3].tolist()


def test_contains_with_empty_lists() -> None:
    empty = Positives(torch.zeros(3, dtype=torch.int64), torch.empty(0, dtype=torch.int32))
    assert not empty.contains(torch.tensor([0, 1]), torch.tensor([0, 5])).any()


@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_never_a_positive_always_a_candidate(density: float) -> None:
    positives, liked = random_positives(30, 50, density)
    liked[:, 7] = False  # an item without training interactions
    liked[torch.arange(30), torch.arange(30) + 10] = False  # nobody likes everything
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), liked.sum(1).cumsum(0)])
    positives = Positives(indptr, liked.nonzero()[:, 1].to(torch.int32))
    users, _, negatives = draw(positives, liked)
    assert negatives.shape == (len(users), 3)
    assert not liked[users[:, None], negatives].any()
    assert liked.any(0)[negatives].all()


def test_users_with_one_item_left_get_it() -> None:
    """Rejection alone would take 20,000 draws on average."""
    liked = torch.ones(2, 20_000, dtype=torch.bool)
    liked[0, 123] = False
    liked[1, 5:] = False
    indptr = torch.tensor([0, 19_999, 20_004])
    positives = Positives(indptr, liked.nonzero()[:, 1].to(torch.int32))
    users, items = torch.tensor([0, 0]), torch.tensor([1, 2])
    found = draw_negatives(
        users,
        items,
        rows=users,
        positives=positives,
        candidates=torch.arange(20_000),
        seed=0,
        epoch=0,
    )
    assert found.tolist() == [[123], [123]]


def draws(num_users: int, num_items: int, candidates: int, **changes: int) -> torch.Tensor:
    """Return the negatives of all (user, item) pairs of users that like nothing."""
    users, items = (x.ravel() for x in torch.meshgrid(
        torch.arange(num_users), torch.arange(num_items), indexing="ij"))  # fmt: skip
    return draw_negatives(
        users,
        items,
        rows=users,
        positives=Positives(torch.zeros(num_users + 1, dtype=torch.int64), torch.empty(0).int()),
        candidates=torch.arange(candidates),
        **{"seed": 0, "epoch": 0, **changes},
    )


def test_uniform_over_what_is_left() -> None:
    positives = Positives(torch.tensor([0, 2]), torch.tensor([2, 4]))
    n = 50_000
    users = torch.zeros(n, dtype=torch.int64)
    found = draw_negatives(
        users,
        torch.arange(n),
        rows=users,
        positives=positives,
        candidates=torch.arange(10),
        seed=0,
        epoch=0,
    )
    counts = torch.bincount(found.ravel(), minlength=10)
    assert counts[[2, 4]].sum() == 0
    assert stats.chisquare(counts[[0, 1, 3, 5, 6, 7, 8, 9]]).pvalue > 1e-3


@pytest.mark.parametrize("candidates", [2, 7, 64, 1000, 1023])
@pytest.mark.parametrize(("num_users", "num_items"), [(1, 60_000), (60_000, 1), (250, 240)])
def test_uniform_over_users_and_items(num_users: int, num_items: int, candidates: int) -> None:
    counts = np.bincount(draws(num_users, num_items, candidates).ravel(), minlength=candidates)
    assert len(counts) == candidates
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("first", "second"),
    [
        pytest.param({"epoch": 0}, {"epoch": 1}, id="epochs"),
        pytest.param({"epoch": 6}, {"epoch": 7}, id="later epochs"),
        pytest.param({"seed": 3}, {"seed": 4}, id="seeds"),
    ],
)
def test_independent_of_other_epochs_and_seeds(
    first: dict[str, int], second: dict[str, int]
) -> None:
    one, other = (draws(300, 200, 16, **changes).ravel() for changes in (first, second))
    assert_independent(one, other)


def test_independent_of_other_slots_and_interactions() -> None:
    found = draws(300, 200, 16, num_negatives=3)
    for one, other in itertools.combinations(range(3), 2):
        assert_independent(found[:, one], found[:, other])
    table = found[:, 0].view(300, 200)
    for step in (1, 2, 8, 64):
        assert_independent(table[:, :-step].ravel(), table[:, step:].ravel())
        assert_independent(table[:-step].ravel(), table[step:].ravel())


def assert_independent(one: torch.Tensor, other: torch.Tensor) -> None:
    """Compare how often each pair of two of 16 candidates comes with what chance would do."""
    pairs = torch.bincount(one * 16 + other, minlength=256)
    assert stats.chisquare(pairs).pvalue > 1e-4


def test_places_are_even_to_the_last_bit() -> None:
    """Each place gets as many of the numbers that matter, but for one."""
    for count in (1, 2, 3, 100, 255, 256):
        bits = 64 - count.bit_length()
        edges = np.array([0, 1, WORD // 2, WORD - 1], dtype=np.uint64)
        assert uniform_places(edges.copy(), count).tolist() == [
            (int(word) >> (64 - bits)) * count >> bits for word in edges
        ]
        assert int(uniform_places(edges[-1:].copy(), count)[0]) == count - 1
        even = np.arange(256, dtype=np.uint64) << np.uint64(56)
        counts = np.bincount(uniform_places(even, count), minlength=count)
        assert counts.max() - counts.min() <= 1


def test_a_rejected_draw_is_followed_by_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing by blocks and several at once gives what one after another would."""
    monkeypatch.setattr(negatives, "_BLOCK", 50)
    positives, liked = random_positives(30, 40, 0.6)
    users, items, found = draw(positives, liked)
    candidates = liked.any(0).nonzero()[:, 0].tolist()
    key = salt(1, 0, 0x4E4547)
    for user, item, row in zip(users.tolist(), items.tolist(), found.tolist(), strict=True):
        for slot, negative in enumerate(row):
            one_by_one = (
                candidates[place_of((user << 32) | item, key, slot, draw, len(candidates))]
                for draw in range(129)
            )
            assert negative == next(i for i in one_by_one if not liked[user, i])


def place_of(pair: int, key: int, slot: int, draw: int, count: int) -> int:
    """Return a draw's place by arithmetic of whole numbers."""
    number = (slot * 130 + draw) * 0x9E3779B97F4A7C15 + key
    bits = 64 - count.bit_length()
    return (mixed(pair ^ mixed(number)) >> (64 - bits)) * count >> bits


def mixed(word: int) -> int:
    word %= WORD
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    return (word ^ (word >> 27)) * 0x94D049BB133111EB % WORD


def test_depends_on_the_interaction_alone() -> None:
    positives, liked = random_positives(30, 50, 0.3)
    users, items, together = draw(positives, liked)
    candidates = liked.any(0).nonzero()[:, 0]
    for place in (0, 5, len(users) - 1):
        alone = draw_negatives(
            users[place : place + 1],
            items[place : place + 1],
            rows=users[place : place + 1],
            positives=positives,
            candidates=candidates,
            seed=1,
            epoch=0,
            num_negatives=3,
        )
        assert torch.equal(alone[0], together[place])
    assert torch.equal(draw(positives, liked, num_negatives=1)[2], together[:, :1])
    assert not torch.equal(draw(positives, liked, epoch=1)[2], together)
    assert not torch.equal(draw(positives, liked, seed=2)[2], together)


def test_a_user_of_everything_is_named() -> None:
    positives = Positives(torch.tensor([0, 1, 4]), torch.tensor([0, 0, 1, 2]))
    with pytest.raises(UserError, match=r"user_index 1 .*all 3 items"):
        draw_negatives(
            torch.tensor([0, 1]),
            torch.tensor([0, 0]),
            rows=torch.tensor([0, 1]),
            positives=positives,
            candidates=torch.arange(3),
            seed=0,
            epoch=0,
        )
