"""Negatives: never a positive, uniform over what is left, a function of the interaction alone."""

import math

import pytest
import torch

from alignrec.errors import UserError
from alignrec.graph.negatives import Positives, draw_negatives


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


def test_uniform_over_what_is_left() -> None:
    indptr = torch.tensor([0, 2])
    positives = Positives(indptr, torch.tensor([2, 4]))
    n = 20_000
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
    counts = torch.bincount(found.ravel(), minlength=10).double()
    assert counts[[2, 4]].sum() == 0
    left = counts[[0, 1, 3, 5, 6, 7, 8, 9]]
    assert float((left - n / 8).abs().max()) < 5 * math.sqrt(n / 8)


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
