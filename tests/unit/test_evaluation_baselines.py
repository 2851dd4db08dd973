"""Untrained models against their formulas written as loops."""

import numpy as np
import pytest
import torch

from alignrec.data.csr import CSR
from alignrec.evaluation import baselines

NUM_USERS, NUM_ITEMS, DIM, K, SHRINK = 6, 15, 4, 3, 2.0


@pytest.fixture(scope="module")
def train() -> CSR:
    """Every user has items but user 5."""
    dense = torch.rand(NUM_USERS, NUM_ITEMS, generator=torch.Generator().manual_seed(1)) < 0.3
    dense[5] = False
    return CSR.from_pairs(*dense.nonzero(as_tuple=True), NUM_USERS, NUM_ITEMS)


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Random rows; item 4 has neither picture nor text."""
    table = torch.randn(NUM_ITEMS, DIM, generator=torch.Generator().manual_seed(2))
    table[4] = 0
    return table


def test_popularity_is_the_number_of_training_users(train: CSR) -> None:
    scores = baselines.popularity(train)(torch.tensor([3, 0]))
    expected = [sum(i in train.row(u).tolist() for u in range(NUM_USERS)) for i in range(NUM_ITEMS)]
    assert scores.tolist() == [expected, expected]


def test_zero_shot_is_the_cosine_to_the_mean_of_the_features_as_they_are(
    train: CSR, features: torch.Tensor
) -> None:
    table = features.numpy().astype(np.float64)
    norms = np.linalg.norm(table, axis=1, keepdims=True)
    unit = np.divide(table, norms, out=np.zeros_like(table), where=norms > 0)
    scores = baselines.zero_shot(train, features)(torch.arange(5))
    for user in range(5):
        mean = table[train.row(user).numpy()].mean(axis=0)
        expected = unit @ mean / np.linalg.norm(mean)
        np.testing.assert_allclose(scores[user].numpy(), expected, atol=1e-6)


def test_zero_shot_scores_zero_where_nothing_is_known(train: CSR, features: torch.Tensor) -> None:
    scores = baselines.zero_shot(train, features)(torch.arange(NUM_USERS))
    assert (scores[5] == 0).all()
    assert (scores[:, 4] == 0).all()


def literal_similarity(features: torch.Tensor) -> list[dict[int, float]]:
    rows = features.double().tolist()
    result = []
    for i, a in enumerate(rows):
        similar = {}
        for j, b in enumerate(rows):
            dot = sum(x * y for x, y in zip(a, b, strict=True))
            norms = sum(x * x for x in a) ** 0.5 * sum(y * y for y in b) ** 0.5
            if i != j and dot > 0:
                similar[j] = dot / (norms + SHRINK)
        best = sorted(similar, key=lambda j: -similar[j])[:K]
        result.append({j: similar[j] for j in best})
    return result


@pytest.mark.parametrize("block_items", [1, 4, 100])
def test_item_cf_sums_the_similarity_of_the_users_neighbours(
    train: CSR, features: torch.Tensor, block_items: int
) -> None:
    similar = baselines.shrunk_neighbors(features, k=K, shrink=SHRINK, block_items=block_items)
    expected = literal_similarity(features)
    scores = baselines.item_cf(train, similar)(torch.arange(NUM_USERS))
    for user in range(NUM_USERS):
        own = set(train.row(user).tolist())
        literal = [sum(s for j, s in expected[i].items() if j in own) for i in range(NUM_ITEMS)]
        assert scores[user].tolist() == pytest.approx(literal, abs=1e-6)


def test_an_item_without_features_has_no_neighbours_and_is_nobodys(features: torch.Tensor) -> None:
    similar = baselines.shrunk_neighbors(features, k=K, shrink=0.0, block_items=4)
    assert similar[4].nnz == 0
    assert similar[:, 4].nnz == 0
    assert np.isfinite(similar.data).all()
