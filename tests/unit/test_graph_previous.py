"""Neighbours updated from an earlier graph are those of a full search."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignrec import artifacts, configuration
from alignrec.data.schema import read_interactions
from alignrec.errors import StageFailure, UserError
from alignrec.graph import STAGE, cells, schema, searching
from alignrec.graph.previous import row_digests
from alignrec.stage import Context
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_graph


def features_artifact(folder: Path, rows: np.ndarray) -> Path:
    with artifacts.writing(
        folder, kind="features", fingerprint=folder.name, config={}, inputs={}
    ) as draft:
        np.save(draft.path / "features.npy", rows)
        np.save(draft.path / "mask.npy", np.ones((len(rows), 2), dtype=np.bool_))
        draft.counts.update(num_items=len(rows), dim=rows.shape[1])
    return folder


class Days:
    """A catalogue of 60 items yesterday and 70 today."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.rows = np.random.default_rng(1).normal(size=(70, 6)).astype(np.float32)
        self.rows[[5, 61]] = 0
        self.rows[[*range(10, 16), 60]] = self.rows[10]  # more equal items than neighbours

    def graph(self, name: str, rows: np.ndarray, **settings: Any) -> Path:
        dataset = write_dataset(self.root / f"d-{name}", num_items=len(rows), num_users=10)
        return write_graph(
            self.root / name,
            dataset=dataset,
            features=features_artifact(self.root / f"f-{name}", rows),
            **{"k": 4, **settings},
        )

    def yesterday(self, **settings: Any) -> tuple[np.ndarray, Path]:
        """Return the graph of the first 60 items, three of which had other features."""
        rows = self.rows[:60].copy()
        rows[[2, 30]] = np.random.default_rng(2).normal(size=(2, 6))
        rows[44] = 0
        return rows, self.graph("yesterday", rows, **settings)


@pytest.fixture
def days(tmp_path: Path) -> Days:
    return Days(tmp_path)


def lists(graph: Path) -> tuple[np.ndarray, np.ndarray]:
    index, cosine = (np.load(schema.neighbors_path(graph, n)) for n in ("index", "cosine"))
    return index, cosine


@pytest.mark.parametrize("paper_compatible", [False, True])
def test_update_equals_a_full_search(
    days: Days, paper_compatible: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 16)
    _, before = days.yesterday(paper_compatible=paper_compatible)
    full = days.graph("full", days.rows, paper_compatible=paper_compatible)
    updated = days.graph(
        "updated", days.rows, paper_compatible=paper_compatible, knn={"previous": str(before)}
    )
    np.testing.assert_array_equal(lists(updated)[0], lists(full)[0])
    np.testing.assert_allclose(lists(updated)[1], lists(full)[1], atol=2e-6)
    facts = artifacts.read(updated).facts
    # 10 new and 3 changed items, and those that lost a neighbour without another as near.
    assert 13 < facts["num_searched"] < 35
    assert facts["num_searched"] + facts["num_updated"] == 70
    # Some old lists did change, or this would show nothing.
    assert (lists(before)[0] != lists(full)[0][:60]).any(axis=1).sum() > 13


def test_nothing_changed_nothing_searched(days: Days) -> None:
    rows, before = days.yesterday()
    again = days.graph("again", rows, knn={"previous": str(before)})
    assert artifacts.read(again).facts["num_searched"] == 0
    np.testing.assert_array_equal(lists(again)[0], lists(before)[0])
    np.testing.assert_array_equal(lists(again)[1], lists(before)[1])


def test_approximate_update_keeps_its_recall(days: Days) -> None:
    knn = {"method": "ann", "sample": 70}
    _, before = days.yesterday(knn=knn)
    updated = days.graph("updated", days.rows, knn={**knn, "previous": str(before)})
    facts = artifacts.read(updated).facts
    assert facts["recall"] >= 0.95
    assert 13 <= facts["num_searched"] < 70


def test_cells_are_kept_until_too_many_items_have_come(
    days: Days, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    knn = {"method": "ann", "sample": 70}
    rows, before = days.yesterday(knn=knn)
    assigned, cut, sorted_copies = list[list[int]](), list[int](), list[int]()
    assign, train, sort = cells.assign_cells, cells.train_centroids, searching.Search._sorted_rows

    def assigning(features: Any, centroids: Any, items: np.ndarray) -> np.ndarray:
        assigned.append(items.tolist())
        return assign(features, centroids, items)

    def training(features: Any, **others: Any) -> Any:
        cut.append(features.num_items)
        return train(features, **others)

    def sorting(self: searching.Search, *others: Any) -> Any:
        sorted_copies.append(self.num_items)
        return sort(self, *others)

    monkeypatch.setattr(cells, "assign_cells", assigning)
    monkeypatch.setattr(cells, "train_centroids", training)
    monkeypatch.setattr(searching.Search, "_sorted_rows", sorting)
    added, changed = [], [range(60, 66), range(66, 70), range(30, 34)]
    for night, items in enumerate(changed):
        rows = np.concatenate([rows, days.rows[len(rows) : max(items) + 1]])
        rows[list(items)] += 0.5
        after = days.graph(f"night-{night}", rows, knn={**knn, "previous": str(before)})
        facts = artifacts.read(after).facts
        assert facts["recall"] >= 0.95
        assert facts["num_searched"] < len(rows)
        added.append(facts["num_added"])
        before = after
    # A fifth of 70 items is 14: with one more they are cut anew, below.
    assert added == [6, 10, 14]
    assert assigned == [list(items) for items in changed]
    assert not cut
    assert not sorted_copies
    assert "cells of items, kept" in capsys.readouterr().out
    rows[50] += 0.5
    after = days.graph("last", rows, knn={**knn, "previous": str(before)})
    assert cut == [70]
    assert assigned[-1] == list(range(70))
    assert artifacts.read(after).facts["num_added"] == 0
    assert artifacts.read(after).facts["num_searched"] < 70


def test_a_chain_in_one_folder(days: Days) -> None:
    """What the stage writes is what it goes on from: reused, resumed and made again as asked."""
    output = days.root / "graph"
    knn = {"previous": str(output), "optional": True}
    config = STAGE.load_config({"k": 4, "knn": knn})
    identities, inputs = list[str](), dict[str, Path]()
    for night, count in enumerate((60, 64, 70)):
        rows = days.rows[:count]
        inputs = {
            "dataset": write_dataset(days.root / f"d-{night}", num_items=count, num_users=10),
            "features": features_artifact(days.root / f"f-{night}", rows),
        }
        manifest = artifacts.read(write_graph(output, **inputs, k=4, knn=knn))
        earlier = manifest.facts.get("earlier", {}).get("identity")
        assert earlier == (identities[-1] if identities else None)
        assert (manifest.facts["num_searched"] < count) == bool(identities)
        assert STAGE.fingerprint(config, inputs, output) == manifest.fingerprint  # reused
        identities.append(manifest.identity)
    again = artifacts.read(write_graph(output, **inputs, k=4, knn=knn))
    assert again.fingerprint == manifest.fingerprint
    assert again.facts["num_searched"] == 70  # not from itself
    assert again.facts["earlier"] == manifest.facts["earlier"]


def test_a_previous_graph_that_was_replaced_meanwhile(days: Days) -> None:
    rows, before = days.yesterday()
    dataset = write_dataset(days.root / "d", num_items=60, num_users=10)
    inputs = {"dataset": dataset, "features": features_artifact(days.root / "f", rows)}
    config = STAGE.load_config({"k": 4, "knn": {"previous": str(before)}})
    output = days.root / "graph"
    context = Context(inputs, output, STAGE.fingerprint(config, inputs, output), days.root / "logs")
    days.graph("yesterday", rows, k=5)
    with pytest.raises(StageFailure, match="was replaced since this run was started"):
        STAGE.load_run()(config, context)


def test_optional_is_about_previous() -> None:
    with pytest.raises(UserError, match=r"knn\.optional=True has no effect without knn\.previous"):
        STAGE.load_config({"knn": {"optional": True}})


@pytest.mark.parametrize("other", [{"k": 3}, {"knn": {"method": "ann", "sample": 50}}])
def test_lists_made_otherwise_are_not_used(
    days: Days, other: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows, before = days.yesterday(**other)
    again = days.graph("again", rows, knn={"previous": str(before)})
    assert artifacts.read(again).facts["num_searched"] == 60
    assert "yesterday was searched with other settings: all items" in capsys.readouterr().out


def test_a_larger_catalogue_is_another_one(days: Days, capsys: pytest.CaptureFixture[str]) -> None:
    _, before = days.yesterday()
    smaller = days.graph("smaller", days.rows[:40], knn={"previous": str(before)})
    assert artifacts.read(smaller).facts["num_searched"] == 40
    said = capsys.readouterr().out
    assert "yesterday was made of another catalogue, of 60 items: all items" in said


@pytest.mark.parametrize(("method", "most"), [("exact", 30), ("ann", 15)])
def test_too_many_changes_are_searched_afresh(
    days: Days, method: str, most: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each unchanged item would be compared with all that have changed."""
    knn = {"method": method, "sample": 60}
    rows, before = days.yesterday(knn=knn)
    searched = {}
    for changed in (most, most + 1):
        other = rows.copy()
        other[:changed] += 1
        graph = days.graph(f"{changed}", other, knn={**knn, "previous": str(before)})
        searched[changed] = artifacts.read(graph).facts["num_searched"]
    assert searched[most] < searched[most + 1] == 60
    said = capsys.readouterr().out
    assert f"{most + 1} of 60 items are new or changed since {before}, more than {most}: " in said


def test_previous_must_be_a_graph(days: Days) -> None:
    with pytest.raises(UserError, match="no graph here"):
        days.graph("graph", days.rows, knn={"previous": str(days.root / "nothing")})
    _, before = days.yesterday()
    schema.neighbors_path(before, "index").unlink()
    with pytest.raises(UserError, match=r"previous out\.$"):
        days.graph("graph", days.rows, knn={"previous": str(before)})


def test_another_previous_graph_is_another_fingerprint(days: Days) -> None:
    _, before = days.yesterday()
    inputs: dict[str, Path] = {}
    plain = STAGE.load_config({})
    with_previous = STAGE.load_config({"knn": {"previous": str(before)}})
    assert STAGE.fingerprint(plain, inputs) != STAGE.fingerprint(with_previous, inputs)
    assert configuration.to_mapping(with_previous)["knn"]["previous"] == str(before)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_digests_tell_rows_apart(dtype: Any) -> None:
    rows = np.random.default_rng(0).integers(3, size=(300, 4)).astype(dtype)
    digests = row_digests(rows)
    assert digests.shape == (300, 2)
    same_digest = (digests[:, None] == digests[None]).all(axis=-1)
    np.testing.assert_array_equal(same_digest, (rows[:, None] == rows[None]).all(axis=-1))


def test_interactions_do_not_matter_for_the_lists(days: Days) -> None:
    """Only the features decide what is searched again."""
    rows, before = days.yesterday()
    dataset = write_dataset(days.root / "other", num_items=60, num_users=15, seed=4)
    features = features_artifact(days.root / "f-other", rows)
    graph = write_graph(
        days.root / "graph", dataset=dataset, features=features, k=4, knn={"previous": str(before)}
    )
    assert artifacts.read(graph).facts["num_searched"] == 0
    assert artifacts.read(graph).counts["num_train"] == len(read_interactions(dataset, "train")[0])
