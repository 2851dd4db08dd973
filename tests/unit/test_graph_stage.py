"""The graph stage: its artifact, its resume, and what it says about bad input."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from alignrec import artifacts
from alignrec.data.schema import INTERACTIONS, interactions_path, read_interactions
from alignrec.distributed.process_group import Rank
from alignrec.errors import UserError
from alignrec.graph import STAGE, edges, layout, schema, searching
from alignrec.graph.config import GraphConfig
from alignrec.stage import main
from alignrec.telemetry import Telemetry
from alignrec.testing import results
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph


@pytest.fixture
def inputs(tmp_path: Path) -> dict[str, Path]:
    return {
        "dataset": write_dataset(tmp_path / "dataset", num_items=30, num_users=20),
        "features": write_features(tmp_path / "features", num_items=30, zero_rows=(3,)),
    }


def test_artifact_holds_what_is_documented(inputs: dict[str, Path], tmp_path: Path) -> None:
    graph = write_graph(tmp_path / "graph", **inputs, k=4, num_partitions=2)
    manifest = artifacts.verify(graph)
    users, items = read_interactions(inputs["dataset"], "train")
    assert manifest.counts["num_train"] == len(users)
    assert manifest.counts["num_partitions"] == 2
    assert manifest.facts["num_without_neighbours"] == 1
    np.testing.assert_array_equal(np.load(schema.train_items_path(graph)), np.unique(items))
    with np.load(schema.similar_path(graph)) as file:
        assert file["indptr"].dtype == np.int64
        assert file["indices"].dtype == np.int32
        assert file["values"].dtype == np.float32
        assert len(file["indptr"]) == 31
        assert file["indptr"][-1] == len(file["values"]) == manifest.counts["num_similar"]


def test_a_killed_search_goes_on_with_the_same_result(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 8)
    whole = artifacts.read(write_graph(tmp_path / "whole", **inputs)).identity
    calls: list[int] = []
    search = searching.knn.nearest_items

    def dying(rows: Any, queries: Any, **others: Any) -> Any:
        calls.append(int(queries[0]))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return search(rows, queries, **others)

    monkeypatch.setattr(searching.knn, "nearest_items", dying)
    with pytest.raises(KeyboardInterrupt):
        write_graph(tmp_path / "graph", **inputs)
    resumed = artifacts.read(write_graph(tmp_path / "graph", **inputs)).identity
    assert calls == [0, 8, 16, 16, 24]
    assert resumed == whole


def test_killed_while_partitions_are_written(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = artifacts.read(write_graph(tmp_path / "whole", **inputs)).identity
    written: list[str] = []
    save = layout._save

    def dying(path: Path, content: Any) -> None:
        written.append(f"{path.parent.name}/{path.name}")
        if len(written) == 5:  # in the middle of the second partition
            raise KeyboardInterrupt
        save(path, content)

    monkeypatch.setattr(layout, "_save", dying)
    with pytest.raises(KeyboardInterrupt):
        write_graph(tmp_path / "graph", **inputs)
    resumed = artifacts.verify(write_graph(tmp_path / "graph", **inputs))
    assert resumed.identity == whole
    assert written.count("part_0.writing/graph.pt") == 1
    assert written.count("part_1.writing/node_feats.pt") == 2
    assert not any("writing" in name for name in resumed.files)


def test_ranks_share_all_chunks_whatever_the_others_have_written(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 8)
    monkeypatch.setattr(searching, "barrier", lambda rank: None)
    features = np.load(inputs["features"] / "features.npy")
    with Telemetry(tmp_path, "graph", enabled=False) as telemetry:
        for index in range(2):  # the second looks when the first has written its chunks
            rank = Rank(index, world_size=2)
            searching.Search(GraphConfig(), features, tmp_path, rank, telemetry).run()
    names = sorted(path.name for path in tmp_path.glob("neighbours_*.npz"))
    assert names == [f"neighbours_{start:012d}.npz" for start in (0, 8, 16, 24)]


def test_features_of_another_catalogue(inputs: dict[str, Path], tmp_path: Path) -> None:
    features = write_features(tmp_path / "others", num_items=29)
    with pytest.raises(UserError, match=r"shape \(29, 12\).* 30 items"):
        write_graph(tmp_path / "graph", dataset=inputs["dataset"], features=features)
    other = write_dataset(tmp_path / "other", num_items=30, num_users=20, seed=1)
    features = results.write_features(tmp_path / "others", other)
    with pytest.raises(UserError, match="was made from the dataset"):
        write_graph(tmp_path / "graph", dataset=inputs["dataset"], features=features)


@pytest.mark.parametrize("damage", ["missing", "torn"])
@pytest.mark.parametrize("name", ["features/features.npy", "dataset/interactions/train.parquet"])
def test_unreadable_files(inputs: dict[str, Path], tmp_path: Path, name: str, damage: str) -> None:
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        write_graph(tmp_path / "graph", **inputs)


def test_no_training_interactions(inputs: dict[str, Path], tmp_path: Path) -> None:
    path = interactions_path(inputs["dataset"], "train")
    pq.write_table(INTERACTIONS.empty_table(), path)
    with pytest.raises(UserError, match="no interactions"):
        write_graph(tmp_path / "graph", **inputs)


def test_interaction_with_an_unknown_item(inputs: dict[str, Path], tmp_path: Path) -> None:
    path = interactions_path(inputs["dataset"], "train")
    table = pq.read_table(path).to_pylist()
    table[0]["item_index"] = 30
    pq.write_table(type(pq.read_table(path)).from_pylist(table, schema=INTERACTIONS), path)
    with pytest.raises(UserError, match=r"item_index 30, outside of 0\.\.29"):
        write_graph(tmp_path / "graph", **inputs)


def test_more_nodes_than_32_bits_number(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schema, "MAX_NODES", 30)
    write_graph(tmp_path / "most", **inputs)
    monkeypatch.setattr(schema, "MAX_NODES", 29)
    with pytest.raises(UserError, match="20 users and 30 items, but the graph numbers at most 29"):
        write_graph(tmp_path / "graph", **inputs)


def test_more_partitions_than_nodes(inputs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="num_partitions=51 is more than the 50 users and items"):
        write_graph(tmp_path / "graph", **inputs, num_partitions=51)


def test_uneven_partitions_are_told(
    inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(Telemetry, "say", lambda _, line: said.append(line))
    write_graph(tmp_path / "even", **inputs, num_partitions=2)
    assert not any("warning" in line for line in said)
    uneven = write_graph(tmp_path / "uneven", **inputs, num_partitions=25, partition_method="hash")
    factor = artifacts.read(uneven, "graph").facts["balance"]["all_edges"]
    assert factor > 2
    assert f"the largest partition has {factor:.1f} times the average number" in said[-1]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([0, 1, 1], r"in row 2 after"),
        ([1, 0], r"in row 1 after"),
        ([0, 40, 3], r"in row 2 after"),
    ],
)
def test_repeated_or_unsorted_interactions(
    inputs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[int],
    told: str,
) -> None:
    monkeypatch.setattr(edges, "BLOCK_EDGES", 2)  # the last row is in a block of its own
    path = interactions_path(inputs["dataset"], "train")
    pq.write_table(pq.read_table(path).take(rows), path)
    with pytest.raises(UserError, match=f"{told}.* each once"):
        write_graph(tmp_path / "graph", **inputs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "graph.k=0"], "graph.k=0 is out of range"),
        (["--set", "graph.partition_method=metris"], "Did you mean metis?"),
        (["--set", "graph.num_partition=3"], "Did you mean num_partitions"),
    ],
)
def test_command_line_reports_mistakes_in_a_line(
    inputs: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    folders = [f"--{kind}={path}" for kind, path in inputs.items()]
    code = main(STAGE, [*folders, f"--output={tmp_path / 'graph'}", *arguments])
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert error.count("\n") == 1


def test_command_line_writes_the_artifact(inputs: dict[str, Path], tmp_path: Path) -> None:
    folders = [f"--{kind}={path}" for kind, path in inputs.items()]
    assert main(STAGE, [*folders, f"--output={tmp_path / 'graph'}", "--set", "graph.k=2"]) == 0
    assert artifacts.verify(tmp_path / "graph").facts["k"] == 2


def test_settings_in_the_documentation_are_settings() -> None:
    text = (Path(__file__).parents[2] / "docs" / "graph.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    configs = [STAGE.load_config(yaml.safe_load(block)["graph"]) for block in blocks]
    assert len(configs) == 5
    assert configs[0] == GraphConfig()
