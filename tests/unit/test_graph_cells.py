"""Approximate search: the laws of the exact one, and the recall that it says it has."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignrec import artifacts
from alignrec.distributed.process_group import Rank
from alignrec.errors import StageFailure
from alignrec.graph import STAGE, cells, schema, searching
from alignrec.graph.knn import FeatureRows, Neighbors, nearest_items
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph

ANN = {"method": "ann", "sample": 50}


def clustered(num_items: int, *, dim: int = 12, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_items // 20 + 1, dim))
    rows = centres[rng.integers(len(centres), size=num_items)]
    return (rows + 0.3 * rng.normal(size=rows.shape)).astype(np.float32)


def find(
    features: np.ndarray, work: Path, *, k: int = 5, paper: bool = False, **knn: Any
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """Return neighbour lists, cosines and facts of a search in this process."""
    work.mkdir()
    config = STAGE.load_config({"k": k, "knn": knn, "paper_compatible": paper})
    with Telemetry(work, "graph", enabled=False) as telemetry:
        search = searching.Search(config, features, work, Rank(), telemetry)
        facts = search.run()
        search.write(work, facts)
    load = [np.load(schema.neighbors_path(work, name)) for name in ("index", "cosine")]
    return load[0], load[1], facts


@pytest.mark.parametrize("paper", [False, True])
def test_recall_of_one_over_all_items_is_the_exact_search(tmp_path: Path, paper: bool) -> None:
    features = clustered(300)
    features[[7, 40]] = 0
    features[100:110] = features[100]  # more duplicates than neighbours
    exact = find(features, tmp_path / "exact", paper=paper, method="exact")
    every = find(features, tmp_path / "ann", paper=paper, method="ann", recall=1.0, sample=300)
    np.testing.assert_array_equal(every[0], exact[0])
    np.testing.assert_allclose(every[1], exact[1], atol=2e-6)


def test_laws_hold_with_few_cells(tmp_path: Path) -> None:
    features = clustered(600)
    features[[3, 9]] = 0
    features[200:205] = features[200]
    index, cosine, facts = find(features, tmp_path / "ann", recall=0.9, **ANN)
    assert facts["probes"] < facts["cells"]
    assert (index[[3, 9]] == -1).all()
    assert not np.isin(index, [3, 9]).any()
    assert not (index == np.arange(600)[:, None]).any()
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-30)
    found = index >= 0
    rows = np.broadcast_to(np.arange(600)[:, None], index.shape)[found]
    np.testing.assert_allclose(cosine[found], (unit[rows] * unit[index[found]]).sum(1), atol=2e-6)
    assert (np.diff(cosine, axis=1) <= 0).all()
    for item in range(200, 205):  # equal rows are in one cell, so find each other first
        others = [i for i in range(200, 205) if i != item]
        assert sorted(index[item, :4].tolist()) == others


@pytest.mark.parametrize("target", [0.5, 0.8, 0.99])
def test_recall_is_what_a_comparison_with_the_exact_lists_says(
    tmp_path: Path, target: float
) -> None:
    features = np.random.default_rng(5).normal(size=(400, 8)).astype(np.float32)
    index, _, facts = find(features, tmp_path / "ann", method="ann", recall=target, sample=400)
    assert (index >= 0).all()
    rows = FeatureRows(features, torch.device("cpu"))
    exact = nearest_items(
        rows, torch.arange(400), k=5, block_columns=400, include_self=False
    ).index.numpy()
    shared = np.mean([np.isin(a, b).mean() for a, b in zip(exact, index, strict=True)])
    assert facts["recall"] == pytest.approx(shared, abs=1e-4)
    assert facts["recall"] == pytest.approx(facts["expected_recall"], abs=0.01)
    assert target <= facts["recall"] <= target + 0.2


def test_same_seed_same_lists_whatever_the_chunks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = clustered(500, seed=3)
    first = find(features, tmp_path / "first", **ANN)
    # Cells are assigned in chunks too, so they may round differently, but not with this few items.
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 128)
    monkeypatch.setattr(cells, "_CANDIDATES", 1000)
    monkeypatch.setattr(cells, "_COLUMNS", 16)
    again = find(features, tmp_path / "again", **ANN)
    np.testing.assert_array_equal(first[0], again[0])
    assert first[2] == again[2]


def test_a_killed_search_goes_on_with_the_same_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 64)
    dataset = write_dataset(tmp_path / "dataset", num_items=200, num_users=20)
    inputs = {"dataset": dataset, "features": write_features(tmp_path / "rows", num_items=200)}
    whole = write_graph(tmp_path / "whole", **inputs, knn=ANN)
    original = cells.search_cells
    calls: list[int] = []

    def dying(*arguments: Any, **others: Any) -> Neighbors:
        calls.append(len(arguments[1]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **others)

    monkeypatch.setattr(cells, "search_cells", dying)
    with pytest.raises(KeyboardInterrupt):
        write_graph(tmp_path / "graph", **inputs, knn=ANN)
    resumed = write_graph(tmp_path / "graph", **inputs, knn=ANN)
    assert calls == [64, 64, 64, 64, 8]
    assert artifacts.read(resumed).identity == artifacts.read(whole).identity


def test_too_low_a_recall_fails_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = cells.search_cells

    def careless(*arguments: Any, probes: int, **others: Any) -> Neighbors:
        return original(*arguments, probes=1, **others)

    monkeypatch.setattr(cells, "search_cells", careless)
    features = np.random.default_rng(5).normal(size=(400, 8)).astype(np.float32)
    with pytest.raises(StageFailure, match=r"below graph.knn.recall=0\.95.*method=exact"):
        find(features, tmp_path / "ann", **ANN)


def test_recall_is_measured_on_other_items_than_chose_the_cells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choosing: list[torch.Tensor] = []
    original = cells.recall_by_probes

    def spy(index: Any, cell: Any, vectors: torch.Tensor, exact: Neighbors) -> torch.Tensor:
        choosing.append(vectors)
        return original(index, cell, vectors, exact)

    monkeypatch.setattr(cells, "recall_by_probes", spy)
    features = np.random.default_rng(5).normal(size=(400, 8)).astype(np.float32)
    index, _, facts = find(features, tmp_path / "ann", method="ann", recall=0.6, sample=200)
    measured = np.load(tmp_path / "ann" / "sample.npz")
    rows = FeatureRows(features, torch.device("cpu"))
    others = rows.take(torch.from_numpy(measured["item"]))[0]
    assert len(others) == len(choosing[0]) == facts["recall_sample"] == 100
    assert (torch.cdist(others, choosing[0]) > 1e-3).all()
    found = index[measured["item"]]
    shared = [np.isin(a, b).mean() for a, b in zip(measured["index"], found, strict=True)]
    assert facts["recall"] == pytest.approx(np.mean(shared), abs=1e-4)


@pytest.mark.parametrize(("recall", "fails"), [(0.94, False), (0.92, True)])
def test_chance_alone_fails_no_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recall: float, fails: bool
) -> None:
    monkeypatch.setattr(cells, "measured_recall", lambda *_: (recall, 0.01))
    outcome = pytest.raises(StageFailure) if fails else contextlib.nullcontext()
    with outcome:
        find(clustered(300), tmp_path / "ann", **ANN)


def test_auto_goes_by_the_number_of_items(tmp_path: Path) -> None:
    features = clustered(100)
    assert find(features, tmp_path / "a", auto_items=100)[2]["search"]["method"] == "exact"
    facts = find(features, tmp_path / "b", auto_items=99)[2]
    assert facts["search"]["method"] == "ann"
    assert facts["recall"] >= 0.95


def test_a_catalogue_without_features(tmp_path: Path) -> None:
    index, _, facts = find(np.zeros((30, 4), np.float32), tmp_path / "ann", **ANN)
    assert (index == -1).all()
    assert facts["recall"] == 1.0
