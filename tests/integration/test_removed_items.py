"""Items of an earlier catalogue and users without interactions, through every later stage."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from alignrec import artifacts, export
from alignrec.align import STAGE as ALIGN
from alignrec.data import schema
from alignrec.evaluation import STAGE as EVALUATION
from alignrec.features import STAGE as FEATURES
from alignrec.features.config import ExtractionConfig
from alignrec.features.extraction import content_mask
from alignrec.graph import STAGE as GRAPH
from alignrec.graph import schema as graph_schema
from alignrec.stage import Stage, main
from alignrec.testing.datasets import write_dataset
from alignrec.testing.results import write_embeddings

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS, NUM_USERS = 48, 30
REMOVED = (0, 10, 11, 47)
IDLE = (0, 7, 29)
PRETRAINING = (
    "encoder.num_layers=1", "encoder.width=16", "encoder.num_heads=2", "encoder.hidden=16",
    "encoder.image_size=16", "encoder.patch_size=4", "encoder.max_text_tokens=20",
    "tokenizer.vocabulary_size=320", "global_batch_size=8", "epochs=1",
)  # fmt: skip
TRAINING = ("embedding_dim=8", "batch_size=50", "epochs=2", "learning_rate=0.01")


def run(stage: Stage, folder: Path, inputs: Sequence[str], settings: Sequence[str] = ()) -> int:
    """Run a stage into ``folder / its name``; inputs are "kind" or "kind=folder's name"."""
    named = [name.partition("=") for name in inputs]
    arguments = [f"--{kind}={folder / (name or kind)}" for kind, _, name in named]
    arguments += [f"--set={stage.name}.{setting}" for setting in settings]
    return main(stage, [*arguments, f"--output={folder / stage.name}"])


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    write_dataset(
        folder / "dataset",
        num_items=NUM_ITEMS,
        num_users=NUM_USERS,
        image_size=16,
        without_text=(5,),
        without_image=(5,),
        removed=REMOVED,
        idle_users=IDLE,
    )
    settings = [f"--set=pretrain.{setting}" for setting in PRETRAINING]
    arguments = [f"--dataset={folder / 'dataset'}", f"--output={folder / 'pretrain'}", *settings]
    # DeepSpeed warns when it is imported, which is no fault of this process.
    subprocess.run([sys.executable, "-m", "alignrec.pretrain", *arguments], cwd=ROOT, check=True)
    assert run(FEATURES, folder, ["dataset", "encoder=pretrain"]) == 0
    assert run(GRAPH, folder, ["dataset", "features"], ["k=4", "num_partitions=2"]) == 0
    assert run(ALIGN, folder, ["dataset", "features", "graph"], TRAINING) == 0
    return folder


def test_rows_of_removed_items_are_zero_and_nobodys_neighbour(run_dir: Path) -> None:
    assert len(schema.read_samples(run_dir / "dataset")) == NUM_ITEMS - len(REMOVED)
    without_content = np.isin(np.arange(NUM_ITEMS), [*REMOVED, 5])
    rows = np.load(run_dir / "features" / "features.npy")
    np.testing.assert_array_equal(np.abs(rows).sum(axis=1) == 0, without_content)
    np.testing.assert_array_equal(
        np.load(run_dir / "features" / "mask.npy").any(axis=1), ~without_content
    )
    with np.load(graph_schema.similar_path(run_dir / "graph")) as similar:
        neighbours = np.diff(similar["indptr"])
        row = np.repeat(np.arange(NUM_ITEMS), neighbours)
        assert not np.isin(similar["indices"], [*REMOVED, 5]).any()
        assert (row != similar["indices"]).all()
    np.testing.assert_array_equal(neighbours == 0, without_content)


def test_a_row_that_still_says_text_and_image_counts_for_nothing(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=12, num_users=4)
    items = schema.read_items(dataset)
    removed = np.isin(np.arange(12), [3, 4])
    place = items.column_names.index("removed")
    changed = items.set_column(place, schema.ITEMS.field("removed"), [removed])
    pq.write_table(changed, dataset / "items.parquet")
    np.testing.assert_array_equal(content_mask(dataset, ExtractionConfig()).any(axis=1), ~removed)


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_removed_items_take_no_place_in_validation(
    run_dir: Path, tmp_path: Path, mode: str
) -> None:
    for name in ("dataset", "features", "graph"):
        (tmp_path / name).symlink_to(run_dir / name)
    # Lists of 20 of the 44 items that are left: with the removed ones recall could only be less.
    settings = [*TRAINING, f"mode={mode}"]
    assert run(ALIGN, tmp_path, ["dataset", "features", "graph"], settings) == 0
    tables = load_file(tmp_path / "align" / "embeddings.safetensors")
    recalls = literal_recalls(run_dir / "dataset", tables, "valid", k=20)
    found = artifacts.read(tmp_path / "align").facts["valid"]["recall@20"]
    assert found == pytest.approx(np.mean(recalls), abs=1e-6)


def literal_recalls(dataset: Path, tables: dict, split: schema.Split, *, k: int) -> list[float]:  # type: ignore[type-arg]
    """Return the recall of every user with training items, by loops."""
    items_of = {
        name: {int(u): set(item[user == u].tolist()) for u in np.unique(user)}
        for name in ("train", split)
        for user, item in [schema.read_interactions(dataset, name)]  # type: ignore[arg-type]
    }
    recalls = []
    for user, seen in items_of["train"].items():
        scores = (tables["item"] @ tables["user"][user]).tolist()
        candidates = set(range(NUM_ITEMS)) - seen - set(REMOVED)
        ranked = sorted(candidates, key=lambda item: -scores[item])
        truth = items_of[split][user]
        recalls.append(len(truth & set(ranked[:k])) / len(truth))
    return recalls


def test_no_model_ranks_a_removed_item_and_the_report_says_how_many(run_dir: Path) -> None:
    inputs = ["dataset", "embeddings=align", "features"]
    assert run(EVALUATION, run_dir, inputs, ["ks=[5,20,44]"]) == 0
    results = json.loads((run_dir / "evaluation" / "metrics.json").read_text())
    tables = load_file(run_dir / "align" / "embeddings.safetensors")
    recalls = literal_recalls(run_dir / "dataset", tables, "test", k=20)
    assert results["alignrec"]["test"]["recall@20"] == pytest.approx(np.mean(recalls))
    for model, splits in results.items():  # all 44 candidates are listed, so nothing is missed
        assert splits["test"]["recall@44"] == 1.0, model
    counts = artifacts.read(run_dir / "evaluation").counts
    assert counts["num_removed_items"] == len(REMOVED)
    assert counts["num_test_users"] == NUM_USERS - len(IDLE)
    page = (run_dir / "evaluation" / "report" / "index.html").read_text()
    assert "full ranking of 44 items" in page
    assert "4 removed" in page


def test_no_list_holds_a_removed_item_and_idle_users_have_none(run_dir: Path) -> None:
    inputs = ["dataset", "embeddings=align"]
    assert run(export.STAGE, run_dir, inputs, ["top_k=60"]) == 0
    table = pq.read_table(run_dir / "export" / "topk.parquet")
    listed = set(table["item_key"].to_pylist())
    assert listed == {f"item-{i}" for i in range(NUM_ITEMS) if i not in REMOVED}
    assert len(table) == (NUM_USERS - len(IDLE)) * (NUM_ITEMS - len(REMOVED) - 6)
    users = set(table["user_key"].to_pylist())
    assert users == {f"user-{u}" for u in range(NUM_USERS) if u not in IDLE}
    counts = artifacts.read(run_dir / "export").counts
    assert counts["num_removed_items"] == len(REMOVED)
    assert counts["num_users_without_history"] == len(IDLE)


def test_held_out_interactions_with_removed_items_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    items = schema.read_items(dataset)
    _, held_out = schema.read_interactions(dataset, "test")
    removed = np.arange(NUM_ITEMS) == held_out[0]
    place = items.column_names.index("removed")
    changed = items.set_column(place, schema.ITEMS.field("removed"), [removed])
    pq.write_table(changed, dataset / "items.parquet")
    write_embeddings(tmp_path / "align", dataset)
    assert run(EVALUATION, tmp_path, ["dataset", "embeddings=align"]) == 2
    assert "valid.parquet are with removed items" in capsys.readouterr().err


def test_a_dataset_from_before_the_column_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=12, num_users=4)
    older = schema.read_items(dataset).drop_columns(["removed"])
    pq.write_table(older, dataset / "items.parquet")
    write_embeddings(tmp_path / "align", dataset)
    assert run(export.STAGE, tmp_path, ["dataset", "embeddings=align"]) == 2
    error = capsys.readouterr().err
    assert "removed" in error
    assert error.count("\n") == 1
