"""Losses against literal float64 formulas, in value and gradient."""

import pytest
import torch
from torch import Tensor

from alignrec.align import losses
from alignrec.align.batches import Distinct
from alignrec.align.config import MIN_TEMPERATURE

B, D, F, ITEMS, TAU = 13, 5, 7, 6, 0.2


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor, Distinct]:
    """Two views of a table, content of it, and a batch in which rows repeat."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(ITEMS, D, dtype=torch.float64, generator=g, requires_grad=True)
    second = torch.randn(ITEMS, D, dtype=torch.float64, generator=g, requires_grad=True)
    content = losses.unit_rows(torch.randn(ITEMS, F, dtype=torch.float64, generator=g))
    chosen = Distinct.of(torch.randint(ITEMS, (B,), generator=g))
    assert len(chosen.ids) < B
    return first, second, content, chosen


def same(mine: Tensor, literal: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(mine, literal)
    gradients = torch.autograd.grad(mine, inputs, retain_graph=True)
    for found, wanted in zip(gradients, torch.autograd.grad(literal, inputs), strict=True):
        torch.testing.assert_close(found, wanted)


def literal_info_nce(anchor: Tensor, positive: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(anchor)):
        cosine = torch.nn.functional.cosine_similarity(anchor[b : b + 1], positive)
        weights = (cosine / TAU).exp()
        total = total - (weights[b] / weights.sum()).log()
    return total / len(anchor)


def test_info_nce_with_repeated_rows_equals_the_literal_sum(
    batch: tuple[Tensor, Tensor, Tensor, Distinct],
) -> None:
    first, second, _, chosen = batch
    count = chosen.count.double()
    mine = losses.info_nce_loss(
        first[chosen.ids],
        second[chosen.ids],
        positive=torch.arange(len(chosen.ids)),
        anchor_count=count,
        candidate_count=count,
        temperature=TAU,
        num_triples=B,
    )
    rows = chosen.ids[chosen.position]
    same(mine, literal_info_nce(first[rows], second[rows]), first, second)


def test_info_nce_of_shares_of_a_batch_adds_up(
    batch: tuple[Tensor, Tensor, Tensor, Distinct],
) -> None:
    first, second, _, chosen = batch
    rows = chosen.ids[chosen.position]
    parts = [
        losses.info_nce_loss(
            first[rows[share]],
            second[rows],
            positive=share,
            anchor_count=torch.ones(len(share), dtype=torch.float64),
            candidate_count=torch.ones(B, dtype=torch.float64),
            temperature=TAU,
            num_triples=B,
        )
        for share in (torch.arange(4), torch.arange(4, B))
    ]
    same(parts[0] + parts[1], literal_info_nce(first[rows], second[rows]), first, second)


def test_info_nce_is_finite_at_the_smallest_temperature() -> None:
    anchor = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
    loss = losses.info_nce_loss(
        anchor,
        -anchor.detach(),
        positive=torch.arange(2),
        anchor_count=torch.ones(2),
        candidate_count=torch.ones(2),
        temperature=MIN_TEMPERATURE,
        num_triples=2,
    )
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(1 / MIN_TEMPERATURE, rel=1e-4)
    assert anchor.grad is not None
    assert anchor.grad.isfinite().all()


def test_similarity_loss_equals_the_batch_by_batch_matrix(
    batch: tuple[Tensor, Tensor, Tensor, Distinct],
) -> None:
    table, _, content, chosen = batch
    count = chosen.count.double()
    target = content[chosen.ids]
    mine = losses.similarity_loss(
        losses.similarity_moments(table[chosen.ids], target, count),
        losses.gram_square(target, count),
        num_triples=B,
    )
    rows = chosen.ids[chosen.position]
    difference = table[rows] @ table[rows].T - content[rows] @ content[rows].T
    same(mine, torch.linalg.matrix_norm(difference, ord="fro") / B, table)


def test_both_ways_to_the_gram_square_agree() -> None:
    g = torch.Generator().manual_seed(1)
    count = torch.tensor([1.0, 3.0, 2.0], dtype=torch.float64)
    for f in (2, 9):
        x = torch.randn(3, f, dtype=torch.float64, generator=g)
        repeated = x.repeat_interleave(count.long(), dim=0)
        literal = (repeated @ repeated.T).square().sum()
        torch.testing.assert_close(losses.gram_square(x, count), literal)


def test_bpr_user_item_alignment_and_l2_equal_their_formulas(
    batch: tuple[Tensor, Tensor, Tensor, Distinct],
) -> None:
    user, item, _, _ = batch
    positive, negative = (user * item).sum(1), (user * item.roll(1, 0)).sum(1)
    literal = -torch.stack([(p - n).sigmoid().log() for p, n in zip(positive, negative)]).mean()  # noqa: B905
    same(losses.bpr_loss(positive, negative, num_triples=ITEMS), literal, user, item)

    cosine = torch.stack([u @ i / (u.norm() * i.norm()) for u, i in zip(user, item, strict=True)])
    mine = losses.user_item_alignment_loss(user, item, num_triples=ITEMS)
    same(mine, (1 - cosine).mean(), user, item)

    literal = (user.norm() ** 2 + item.norm() ** 2) / 2 / ITEMS
    same(losses.l2_loss(user, item, num_triples=ITEMS), literal, user, item)


def test_a_zero_row_stays_zero_with_a_finite_gradient() -> None:
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit = losses.unit_rows(x)
    unit.sum().backward()  # type: ignore[no-untyped-call]
    assert unit.tolist() == [[0.0, 0.0], pytest.approx([0.6, 0.8])]
    assert x.grad is not None
    assert x.grad.isfinite().all()
