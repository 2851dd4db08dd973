"""The export stage from its command line to a bundle that other programs read."""

import csv
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from alignrec import artifacts
from alignrec.data import schema
from alignrec.export import STAGE, bundle
from alignrec.stage import main
from alignrec.testing.datasets import write_dataset
from alignrec.testing.results import write_embeddings, write_features

pytestmark = pytest.mark.integration


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    dataset = write_dataset(tmp_path / "data_prep")
    write_features(tmp_path / "features", dataset)
    write_embeddings(tmp_path / "align", dataset)
    return tmp_path


def export(run_dir: Path, *more: str) -> int:
    inputs = [f"--dataset={run_dir}/data_prep", f"--embeddings={run_dir}/align"]
    return main(STAGE, [*inputs, f"--output={run_dir}/export", *more])


def test_lists_are_the_best_unseen_items_of_every_user(run_dir: Path) -> None:
    assert export(run_dir, "--set=export.top_k=7", "--set=export.block_users=5") == 0
    rows = pq.read_table(run_dir / "export" / "topk.parquet").to_pylist()
    tables = load_file(run_dir / "export" / "embeddings.safetensors")
    users, items = schema.read_interactions(run_dir / "data_prep", "train")
    assert len(rows) == 24 * 7
    for user in range(24):
        own = rows[user * 7 : (user + 1) * 7]
        assert [row["user_key"] for row in own] == [f"user-{user}"] * 7
        assert [row["rank"] for row in own] == [*range(1, 8)]
        scores = (tables["item"] @ tables["user"][user]).tolist()
        unseen = set(range(48)) - set(items[users == user].tolist())
        best = sorted(unseen, key=lambda i: -scores[i])[:7]
        assert [row["item_key"] for row in own] == [f"item-{i}" for i in best]
        assert [row["score"] for row in own] == pytest.approx([scores[i] for i in best])


def test_users_get_fewer_items_where_the_catalogue_ends(run_dir: Path) -> None:
    assert export(run_dir, "--set=export.top_k=60") == 0
    table = pq.read_table(run_dir / "export" / "topk.parquet")
    assert table.num_rows == 24 * (48 - 6)
    assert artifacts.verify(run_dir / "export").counts["num_recommendations"] == table.num_rows


def test_users_without_training_items_get_no_list_and_are_counted(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundle, "_PART_USERS", 4)  # in the first part nobody has a history
    train = schema.interactions_path(run_dir / "data_prep", "train")
    strangers = [0, 1, 2, 3, 6, 23]
    kept = pq.read_table(train, filters=[("user_index", "not in", strangers)])
    pq.write_table(kept.cast(schema.INTERACTIONS), train)
    assert export(run_dir, "--set=export.top_k=7") == 0
    table = pq.read_table(run_dir / "export" / "topk.parquet")
    listed = table["user_key"].to_pylist()[::7]
    assert listed == [f"user-{user}" for user in range(24) if user not in strangers]
    assert artifacts.read(run_dir / "export").counts["num_users_without_history"] == 6


@pytest.mark.parametrize("damage", ["missing", "torn"])
@pytest.mark.parametrize("name", ["interactions/train", "interactions/test", "items", "users"])
def test_a_damaged_dataset_is_one_line_and_exit_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
) -> None:
    path = run_dir / "data_prep" / f"{name}.parquet"
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    assert export(run_dir, "--set=export.mmrec=true") == 2
    told = capsys.readouterr().err
    assert f"{path} cannot be read" in told
    assert told.count("\n") == 1


def test_parts_do_not_change_the_lists_and_survive_a_kill(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(run_dir) == 0
    whole = pq.read_table(run_dir / "export" / "topk.parquet")
    monkeypatch.setattr(bundle, "_PART_USERS", 10)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(bundle, "merge_parts", killed)
        assert export(run_dir) == 130
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "_write_part", killed)  # all parts are there: none is ranked again
        assert export(run_dir) == 0
    parts = pq.read_table(run_dir / "export" / "topk.parquet")
    assert parts.drop_columns("score").equals(whole.drop_columns("score"))
    # A matrix product of fewer rows may add up in another order.
    np.testing.assert_allclose(parts["score"], whole["score"], rtol=1e-5)


def test_the_mmrec_files_hold_the_same_interactions(run_dir: Path) -> None:
    features = f"--features={run_dir}/features"
    settings = ["--set=export.mmrec=true", "--set=export.mmrec_name=demo"]
    assert export(run_dir, features, *settings) == 0
    with (run_dir / "export" / "demo.inter").open(newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    for label, split in enumerate(schema.SPLITS):
        users, items = schema.read_interactions(run_dir / "data_prep", split)
        own = [row for row in rows if row["x_label"] == str(label)]
        assert [int(row["userID"]) for row in own] == users.tolist()
        assert [int(row["itemID"]) for row in own] == items.tolist()
        assert {(row["rating"], row["timestamp"]) for row in own} == {("1", "0")}
    exported = np.load(run_dir / "export" / "content_feat.npy")
    np.testing.assert_array_equal(exported, np.load(run_dir / "features" / "features.npy"))


def test_mmrec_files_come_only_where_asked_for(run_dir: Path) -> None:
    assert export(run_dir, f"--features={run_dir}/features") == 0
    files = artifacts.read(run_dir / "export").files
    names = {"embeddings.safetensors", "items.parquet", "topk.parquet", "users.parquet"}
    assert files.keys() == names


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("export.mmrec_name=../up", "cannot be a file name"),
        ("export.top_k=0", "must be at least 1"),
        ("export.topk=3", "Did you mean top_k?"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert export(run_dir, f"--set={setting}") == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_embeddings_of_another_dataset_are_refused(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(run_dir / "data_prep", seed=1)
    assert export(run_dir) == 2
    assert "was made from the dataset" in capsys.readouterr().err
