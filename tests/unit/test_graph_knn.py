"""Nearest items: equal to a brute force, whatever the blocks, with zero rows and duplicates."""

from pathlib import Path

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from alignrec.errors import UserError
from alignrec.graph import similarity
from alignrec.graph.knn import (
    FeatureRows,
    Neighbors,
    decode,
    encode,
    nearest_items,
    order_keys,
)


def search(
    features: np.ndarray, *, k: int, rows: int = 64, columns: int = 64, include_self: bool = False
) -> Neighbors:
    reader = FeatureRows(features, torch.device("cpu"))
    parts = [
        nearest_items(
            reader,
            torch.arange(start, min(start + rows, len(features))),
            k=k,
            block_columns=columns,
            include_self=include_self,
        )
        for start in range(0, len(features), rows)
    ]
    return Neighbors(torch.cat([p.index for p in parts]), torch.cat([p.cosine for p in parts]))


def similarity_graph(
    neighbors: Neighbors, folder: Path, *, weight: str, symmetric: bool
) -> sp.csr_matrix:
    found = similarity.write_similarity(
        neighbors.index.numpy().astype(np.int32),
        neighbors.cosine.numpy(),
        folder / weight,
        weight=weight,  # type: ignore[arg-type]
        symmetric=symmetric,
    )
    size = len(neighbors.index)
    return sp.csr_matrix((found.values, found.indices, found.indptr), shape=(size, size))


def brute_force(features: np.ndarray, k: int) -> np.ndarray:
    unit = features.astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    cosine = unit @ unit.T
    np.fill_diagonal(cosine, -np.inf)
    return np.argsort(-cosine, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize(("rows", "columns"), [(1, 7), (13, 50), (50, 13), (64, 64)])
def test_equals_brute_force_for_any_blocks(rows: int, columns: int) -> None:
    features = np.random.default_rng(0).normal(size=(50, 8)).astype(np.float32)
    found = search(features, k=6, rows=rows, columns=columns)
    np.testing.assert_array_equal(found.index.numpy(), brute_force(features, 6))


def test_equal_items_are_chosen_equally_often(tmp_path: Path) -> None:
    """Chosen by item_index, ten of them would have degree 600, and rows of S would sum to 0.13."""
    features = np.random.default_rng(6).normal(size=(700, 3)).astype(np.float32)
    features[50:650] = features[50]
    found = search(features, k=10, rows=300, columns=256)
    assert (found.index != torch.arange(700)[:, None]).all()
    assert ((found.index[50:650] >= 50) & (found.index[50:650] < 650)).all()
    assert all(len(set(row)) == 10 for row in found.index.tolist())
    torch.testing.assert_close(found.cosine[50:650], torch.ones(600, 10))
    chosen = np.bincount(found.index.numpy().ravel(), minlength=700)
    assert chosen[50:650].max() < 30
    matrix = similarity_graph(found, tmp_path, weight="cosine", symmetric=True)
    assert 0.5 < matrix[50:650].sum(axis=1).min() < matrix[50:650].sum(axis=1).max() < 1.6


def test_who_chooses_which_of_equal_items_does_not_depend_on_blocks() -> None:
    features = np.tile(np.random.default_rng(7).normal(size=(5, 3)), (8, 1)).astype(np.float32)
    whole = search(features, k=3)
    for rows, columns in ((3, 7), (40, 16)):
        np.testing.assert_array_equal(
            search(features, k=3, rows=rows, columns=columns).index, whole.index
        )


def test_order_keys_are_undone() -> None:
    items = torch.tensor([0, 1, 77, 2**31 - 2])
    cosine = torch.tensor([[-1.0, 1.0, 0.25, 0.25], [0.5, -0.5, 0.0, 1.0]])
    queries = torch.tensor([2**31 - 3, 5])
    keys = order_keys(cosine.clone(), queries, items)
    found = decode(keys, queries, 5)
    assert found.index.tolist() == [[*items.tolist(), -1]] * 2
    torch.testing.assert_close(found.cosine[:, :4], cosine)
    torch.testing.assert_close(encode(found, queries)[:, :4], keys)


def test_zero_rows_have_no_neighbours_and_are_nobodys() -> None:
    features = np.random.default_rng(1).normal(size=(12, 4)).astype(np.float16)
    features[[2, 5]] = 0
    found = search(features, k=20)
    assert (found.index[[2, 5]] == -1).all()
    assert (found.cosine[[2, 5]] == 0).all()
    others = [i for i in range(12) if i not in (2, 5)]
    for item in others:
        listed = [i for i in found.index[item].tolist() if i >= 0]
        assert sorted(listed) == [i for i in others if i != item]


def test_huge_features_do_not_overflow() -> None:
    features = np.array([[3e38, 3e38], [1.0, 1.0], [1.0, -1.0]], dtype=np.float32)
    found = search(features, k=1)
    assert found.index[:, 0].tolist()[:2] == [1, 0]


def test_a_feature_that_is_not_finite_is_named() -> None:
    features = np.ones((5, 2), dtype=np.float32)
    features[3, 1] = np.nan
    with pytest.raises(UserError, match="row 3"):
        search(features, k=1)


@pytest.mark.parametrize("bucket_rows", [7, 40, 1000])
def test_graph_is_symmetric_and_normalised(
    tmp_path: Path, bucket_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(similarity, "_BUCKET_ROWS", bucket_rows)
    features = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    neighbors = search(features, k=4)
    matrix = similarity_graph(neighbors, tmp_path, weight="cosine", symmetric=True).toarray()
    np.testing.assert_array_equal(matrix, matrix.T)
    assert not matrix.diagonal().any()
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    joined = np.zeros((40, 40), dtype=bool)
    np.put_along_axis(joined, neighbors.index.numpy(), values=True, axis=1)
    weight = np.where(joined | joined.T, (unit @ unit.T).clip(min=0), 0)
    degree = weight.sum(1)
    np.testing.assert_allclose(matrix, weight / np.sqrt(np.outer(degree, degree)), atol=2e-6)


def test_largest_eigenvalue_of_the_graph_is_one(tmp_path: Path) -> None:
    features = np.random.default_rng(3).normal(size=(30, 5)).astype(np.float32)
    for weight in ("cosine", "binary"):
        matrix = similarity_graph(search(features, k=3), tmp_path, weight=weight, symmetric=True)
        assert np.linalg.eigvalsh(matrix.toarray().astype(np.float64))[-1] == pytest.approx(
            1, abs=1e-5
        )


def test_paper_compatible_graph_is_the_released_formula(tmp_path: Path) -> None:
    """topk of the full similarity, self included; D^-1/2 A D^-1/2 with row sums, directed."""
    features = np.random.default_rng(4).normal(size=(30, 5)).astype(np.float32) + 1
    found = search(features, k=5, include_self=True)
    assert (found.index[:, 0] == torch.arange(30)).all()
    matrix = similarity_graph(found, tmp_path, weight="cosine", symmetric=False).toarray()
    unit = torch.nn.functional.normalize(torch.tensor(features))
    values, columns = (unit @ unit.T).topk(5)
    adjacency = torch.zeros(30, 30).scatter_(1, columns, values)
    scale = adjacency.sum(1).pow(-0.5)
    expected = scale[:, None] * adjacency * scale
    np.testing.assert_allclose(matrix, expected, atol=1e-5)
    assert (matrix != matrix.T).any()
