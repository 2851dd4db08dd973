"""The evaluation stage from its command line to metrics.json and the page."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from alignrec import artifacts
from alignrec.data import schema
from alignrec.evaluation import STAGE, evaluating
from alignrec.stage import main
from alignrec.testing.datasets import write_dataset
from alignrec.testing.results import write_embeddings, write_features

pytestmark = pytest.mark.integration


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with dataset, features and two embeddings."""
    dataset = write_dataset(tmp_path / "data_prep", without_image=(1,))
    write_features(tmp_path / "features", dataset)
    write_embeddings(tmp_path / "align", dataset)
    write_embeddings(tmp_path / "ablation", dataset, seed=1)
    return tmp_path


def evaluate(run_dir: Path, *more: str) -> int:
    inputs = [f"--dataset={run_dir}/data_prep", f"--embeddings={run_dir}/align"]
    return main(STAGE, [*inputs, f"--output={run_dir}/evaluation", *more])


def everything(run_dir: Path) -> list[str]:
    return [f"--features={run_dir}/features", f"--ablation={run_dir}/ablation"]


def metrics_of(run_dir: Path) -> dict[str, dict[str, dict[str, float]]]:
    result: dict[str, dict[str, dict[str, float]]] = json.loads(
        (run_dir / "evaluation" / "metrics.json").read_text()
    )
    return result


def literal_recall(run_dir: Path, k: int) -> float:
    """Recall of align on test, by loops over every user and item."""
    tables = load_file(run_dir / "align" / "embeddings.safetensors")
    splits = {}
    for split in ("train", "test"):
        users, items = schema.read_interactions(run_dir / "data_prep", split)
        splits[split] = [set(items[users == u].tolist()) for u in range(len(tables["user"]))]
    recalls = []
    for user, (seen, truth) in enumerate(zip(splits["train"], splits["test"], strict=True)):
        scores = (tables["item"] @ tables["user"][user]).tolist()
        ranked = sorted((i for i in range(len(scores)) if i not in seen), key=lambda i: -scores[i])
        recalls.append(len(truth & set(ranked[:k])) / len(truth))
    return sum(recalls) / len(recalls)


def test_metrics_report_and_what_is_told(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run_dir, *everything(run_dir)) == 0
    results = metrics_of(run_dir)
    assert list(results) == sorted(["alignrec", "ablation", "popularity", "zero_shot", "item_cf"])
    for splits in results.values():
        assert {"valid", "test"} <= splits.keys()
        assert {"recall@5", "ndcg@10", "precision@20", "map@50"} <= splits["test"].keys()
    assert results["alignrec"]["test"]["recall@20"] == pytest.approx(literal_recall(run_dir, 20))
    page = (run_dir / "evaluation" / "report" / "index.html").read_text()
    assert "data:image/jpeg;base64," in page
    assert f"<h1>{run_dir.name}</h1>" in page
    told = capsys.readouterr().out
    assert "alignrec over popularity: " in told
    assert "alignrec over ablation: " in told
    assert f"report: {run_dir}/evaluation/report/index.html" in told


def test_without_optional_inputs_there_are_two_models(run_dir: Path) -> None:
    assert evaluate(run_dir) == 0
    assert metrics_of(run_dir).keys() == {"alignrec", "popularity"}


def test_block_sizes_change_nothing(run_dir: Path) -> None:
    assert evaluate(run_dir, *everything(run_dir)) == 0
    whole = metrics_of(run_dir)
    settings = ["--set=evaluation.block_users=5", "--set=evaluation.block_items=7"]
    assert evaluate(run_dir, *everything(run_dir), *settings) == 0
    assert metrics_of(run_dir) == whole


def test_cold_items_are_a_split_of_their_own(run_dir: Path) -> None:
    train, test = (schema.interactions_path(run_dir / "data_prep", s) for s in ("train", "test"))
    cold = int(pq.read_table(test)["item_index"][0].as_py())
    kept = pq.read_table(train, filters=[("item_index", "!=", cold)])
    pq.write_table(kept.cast(schema.INTERACTIONS), train)
    task = evaluating.read_task(run_dir / "data_prep")
    assert set(task.held_out["test_cold"].columns.tolist()) >= {cold}
    warm = set(schema.read_interactions(run_dir / "data_prep", "train")[1].tolist())
    assert not warm & set(task.held_out["test_cold"].columns.tolist())
    assert evaluate(run_dir) == 0
    assert "recall@20" in metrics_of(run_dir)["alignrec"]["test_cold"]
    assert artifacts.read(run_dir / "evaluation").counts["num_cold_items"] >= 1


def test_a_killed_run_keeps_its_finished_models(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run_dir, *everything(run_dir)) == 0
    undisturbed = metrics_of(run_dir)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluating.baselines, "popularity", killed)
        assert evaluate(run_dir, *everything(run_dir)) == 130
    capsys.readouterr()
    assert evaluate(run_dir, *everything(run_dir)) == 0
    told = capsys.readouterr().out
    assert told.count("metrics of the interrupted run kept") == 2
    assert metrics_of(run_dir) == undisturbed


def test_a_dataset_without_pictures_and_texts(run_dir: Path) -> None:
    dataset = run_dir / "data_prep"
    items = schema.read_items(dataset).to_pylist()
    bare = [{**row, "title": "", "text": "", "has_image": False} for row in items]
    pq.write_table(pa.Table.from_pylist(bare, schema=schema.ITEMS), dataset / "items.parquet")
    pq.write_table(schema.SAMPLES.empty_table(), dataset / "samples.parquet")
    assert evaluate(run_dir) == 0
    page = (run_dir / "evaluation" / "report" / "index.html").read_text()
    assert "data:image" not in page
    assert '<p title="item-' in page


def broken_embeddings(run_dir: Path) -> None:
    (run_dir / "align" / "embeddings.safetensors").write_bytes(b"not tensors")


def diverged_embeddings(run_dir: Path) -> None:
    path = run_dir / "align" / "embeddings.safetensors"
    tables = {name: t.clone() for name, t in load_file(path).items()}
    tables["item"][0] = torch.nan
    save_file(tables, path)


def fewer_items(run_dir: Path) -> None:
    path = run_dir / "align" / "embeddings.safetensors"
    tables = load_file(path)
    save_file({"user": tables["user"], "item": tables["item"][:-1].clone()}, path)


def features_with_nan(run_dir: Path) -> None:
    rows = np.load(run_dir / "features" / "features.npy")
    rows[3] = np.nan
    np.save(run_dir / "features" / "features.npy", rows)


def nothing_held_out(run_dir: Path) -> None:
    for split in ("valid", "test"):
        path = schema.interactions_path(run_dir / "data_prep", split)
        pq.write_table(schema.INTERACTIONS.empty_table(), path)


def torn_interactions(run_dir: Path) -> None:
    path = schema.interactions_path(run_dir / "data_prep", "valid")
    path.write_bytes(path.read_bytes()[:100])


def another_dataset(run_dir: Path) -> None:
    write_dataset(run_dir / "data_prep", seed=1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (broken_embeddings, "cannot be read"),
        (diverged_embeddings, "1 of 48 item embeddings are not finite"),
        (fewer_items, "it was trained on another dataset"),
        (features_with_nan, "1 of 48 rows of"),
        (nothing_held_out, "no user has both training and held-out interactions"),
        (torn_interactions, "valid.parquet cannot be read"),
        (another_dataset, "was made from the dataset"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], damage: object, message: str
) -> None:
    assert callable(damage)
    damage(run_dir)
    assert evaluate(run_dir, *everything(run_dir)) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith("error: ")
    assert told.count("\n") == 1
    assert not (run_dir / "evaluation").exists()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("evaluation.ks=[20, 10]", "must be ascending"),
        ("evaluation.ks=[]", "must be ascending"),
        ("evaluation.item_cf.neighbours=3", "Did you mean neighbors?"),
        ("evaluation.block_users=0", "must be at least 1"),
    ],
)
def test_bad_settings_are_one_line_and_exit_code_2(
    run_dir: Path, capsys: pytest.CaptureFixture[str], setting: str, message: str
) -> None:
    assert evaluate(run_dir, f"--set={setting}") == 2
    assert message in capsys.readouterr().err
