"""Each metric against its definition written as loops over lists."""

import math

import pytest
import torch

from alignrec.data.csr import CSR
from alignrec.evaluation import metrics

NUM_USERS, NUM_ITEMS, WIDTH = 40, 60, 50


def recall(ranked: list[int], truth: set[int], k: int) -> float:
    return sum(i in truth for i in ranked[:k]) / len(truth)


def precision(ranked: list[int], truth: set[int], k: int) -> float:
    return sum(i in truth for i in ranked[:k]) / k


def ndcg(ranked: list[int], truth: set[int], k: int) -> float:
    gain = sum(1 / math.log2(p + 2) for p, i in enumerate(ranked[:k]) if i in truth)
    return gain / sum(1 / math.log2(p + 2) for p in range(min(len(truth), k)))


def average_precision(ranked: list[int], truth: set[int], k: int) -> float:
    total, hits = 0.0, 0
    for position, item in enumerate(ranked[:k], start=1):
        if item in truth:
            hits += 1
            total += hits / position
    return total / min(len(truth), k)


DEFINITIONS = {
    "recall": (recall, metrics.recall_at_k),
    "precision": (precision, metrics.precision_at_k),
    "ndcg": (ndcg, metrics.ndcg_at_k),
    "map": (average_precision, metrics.map_at_k),
}


@pytest.fixture(scope="module")
def case() -> tuple[torch.Tensor, CSR]:
    """Random lists with -1 at the end of some, and 1 to 30 held-out items each."""
    generator = torch.Generator().manual_seed(5)
    topk = torch.stack([torch.randperm(NUM_ITEMS, generator=generator)[:WIDTH] for _ in range(40)])
    topk[:7, 30:] = -1
    lengths = torch.randint(1, 31, (NUM_USERS,), generator=generator).tolist()
    pairs = [
        (user, int(item))
        for user, length in enumerate(lengths)
        for item in torch.randperm(NUM_ITEMS, generator=generator)[:length]
    ]
    rows, cols = zip(*pairs, strict=True)
    return topk, CSR.from_pairs(rows, cols, NUM_USERS, NUM_ITEMS)


@pytest.mark.parametrize("k", [1, 5, 10, 20, 50])
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_metric_is_its_definition(case: tuple[torch.Tensor, CSR], name: str, k: int) -> None:
    topk, held_out = case
    definition, function = DEFINITIONS[name]
    expected = [
        definition(topk[u].tolist(), set(held_out.row(u).tolist()), k) for u in range(NUM_USERS)
    ]
    assert function(topk, held_out, k=k).item() == pytest.approx(sum(expected) / NUM_USERS)


def test_evaluate_returns_every_metric_at_every_k(case: tuple[torch.Tensor, CSR]) -> None:
    topk, held_out = case
    result = metrics.evaluate(topk, held_out)
    assert result.keys() == {f"{name}@{k}" for name in DEFINITIONS for k in (5, 10, 20, 50)}
    for name, (_, function) in DEFINITIONS.items():
        for k in (5, 10, 20, 50):
            assert result[f"{name}@{k}"] == pytest.approx(function(topk, held_out, k=k).item())


def test_a_perfect_list_scores_one() -> None:
    held_out = CSR.from_pairs([0, 0, 1], [3, 4, 0], 2, 5)
    topk = torch.tensor([[4, 3], [0, 1]])
    assert metrics.recall_at_k(topk, held_out, k=2) == 1
    assert metrics.ndcg_at_k(topk, held_out, k=2) == 1
    assert metrics.map_at_k(topk, held_out, k=2) == 1


def test_users_without_training_or_held_out_items_are_dropped() -> None:
    train = CSR.from_pairs([0, 2, 3], [0, 0, 0], 4, 2)
    held_out = CSR.from_pairs([0, 1, 3], [1, 1, 1], 4, 2)
    assert metrics.evaluation_users(train, held_out).tolist() == [0, 3]


@pytest.mark.parametrize("k", [0, 3])
def test_lists_shorter_than_k_are_refused(k: int) -> None:
    held_out = CSR.from_pairs([0], [0], 1, 5)
    with pytest.raises(ValueError, match=f"k={k} is not within the 2 ranked items"):
        metrics.recall_at_k(torch.tensor([[0, 1]]), held_out, k=k)


def test_lists_of_other_users_are_refused() -> None:
    held_out = CSR.from_pairs([0, 1], [0, 0], 2, 5)
    with pytest.raises(ValueError, match="1 lists for 2 users"):
        metrics.recall_at_k(torch.tensor([[0, 1]]), held_out, k=1)


def test_a_user_without_held_out_items_is_refused() -> None:
    held_out = CSR.from_pairs([0], [0], 2, 5)
    with pytest.raises(ValueError, match="without held-out items"):
        metrics.ndcg_at_k(torch.tensor([[0], [1]]), held_out, k=1)
