"""The align stage as a command: result, resume after SIGKILL, several ranks, errors."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from alignrec import artifacts
from alignrec.align import ABLATION, STAGE, position, training
from alignrec.data import schema
from alignrec.errors import UserError
from alignrec.stage import Context, Stage, main
from alignrec.telemetry import read_history
from alignrec.testing import results
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import DIES_IN_CHECKPOINT, run_ranks

pytestmark = pytest.mark.integration

NUM_USERS, NUM_ITEMS = 40, 30
SETTINGS = {"embedding_dim": 8, "batch_size": 50, "epochs": 4, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("align")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    features = write_features(root / "features", num_items=NUM_ITEMS)
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=4, num_partitions=3)
    return {"dataset": dataset, "features": features, "graph": graph}


def run_stage(
    stage: Stage, folders: dict[str, Path], output: Path, settings: dict[str, Any]
) -> artifacts.Manifest:
    run_rank(stage, folders, output, settings)
    return artifacts.read(output, "embeddings")


def run_rank(
    stage: Stage, folders: dict[str, Path], output: Path, settings: dict[str, Any]
) -> None:
    """Run the stage on this rank; the artifact is there when rank 0 has returned."""
    config = stage.load_config(settings)
    context = Context(
        inputs=folders,
        output=output,
        fingerprint=stage.fingerprint(config, folders),
        log_dir=output.with_name(output.name + ".logs"),
    )
    stage.load_run()(config, context)


def arguments(folders: dict[str, Path], output: Path, settings: dict[str, Any]) -> list[str]:
    inputs = [part for kind, path in folders.items() for part in (f"--{kind}", str(path))]
    sets = [part for k, v in settings.items() for part in ("--set", f"align.{k}={v}")]
    return [*inputs, "--output", str(output), *sets]


def run_command(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def losses(log_dir: Path) -> list[dict[str, Any]]:
    timed = ("time", "triples_per_second")
    return [
        {k: v for k, v in row.items() if k not in timed and not k.startswith("sampling/")}
        for row in read_history(log_dir)
    ]


def test_the_artifact_holds_embeddings_parameters_history_and_facts(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    manifest = run_stage(STAGE, folders, tmp_path / "align", SETTINGS)
    assert set(manifest.files) == {
        "embeddings.safetensors",
        "model.safetensors",
        "history.jsonl",
    }
    tables = load_file(tmp_path / "align" / "embeddings.safetensors")
    assert {name: tuple(t.shape) for name, t in tables.items()} == {
        "user": (NUM_USERS, 8),
        "item": (NUM_ITEMS, 8),
    }
    assert manifest.counts == {"num_users": NUM_USERS, "num_items": NUM_ITEMS, "embedding_dim": 8}
    rows = read_history(tmp_path / "align")
    assert [row["epoch"] for row in rows] == [0, 1, 2, 3]
    best = max(rows, key=lambda row: row["valid/recall@20"])
    assert manifest.facts["best_epoch"] == best["epoch"]
    assert manifest.facts["valid"]["recall@20"] == best["valid/recall@20"]
    assert manifest.facts["epochs_run"] == 4
    assert {"loss/bpr", "loss/cca", "loss/uia", "loss/reg", "loss/l2"} <= rows[0].keys()
    assert rows[-1]["loss/bpr"] < rows[0]["loss/bpr"]


def test_a_long_epoch_has_rows_of_its_own_steps(folders: dict[str, Path], tmp_path: Path) -> None:
    run_stage(STAGE, folders, tmp_path / "plain", {**SETTINGS, "epochs": 2})
    run_stage(STAGE, folders, tmp_path / "often", {**SETTINGS, "epochs": 2, "log_steps": 2})
    ends, rows = read_history(tmp_path / "plain"), read_history(tmp_path / "often")
    num_steps = ends[0]["step"]
    within = [row for row in rows if row["step"] % num_steps]
    assert [row["step"] for row in within] == [2, num_steps + 2]  # a single step has none
    assert [row["epoch"] for row in rows] == pytest.approx(
        [row["step"] / num_steps - 1 for row in rows]
    )
    for row in within:
        assert {"loss/bpr", "triples_per_second", "learning_rate"} <= row.keys()
        assert "valid/recall@20" not in row
    first = [row for row in rows if row["step"] <= num_steps]
    steps = np.diff([0, *(row["step"] for row in first)])
    mean = np.average([row["loss/bpr"] for row in first], weights=steps)
    assert mean == pytest.approx(ends[0]["loss/bpr"])
    whole = [{k: v for k, v in row.items() if k.startswith("valid")} for row in (ends[1], rows[-1])]
    assert whole[0] == whole[1]


def test_the_speed_of_an_epoch_is_its_own(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [0.0]
    steps = training.FullGraphTrainer.steps

    def slower(self: training.FullGraphTrainer, epoch: int, first_step: int) -> Iterator[Any]:
        for terms in steps(self, epoch, first_step):
            clock[0] += 10.0**epoch
            yield terms

    monkeypatch.setattr(training.FullGraphTrainer, "steps", slower)
    monkeypatch.setattr(position.time, "monotonic", lambda: clock[0])
    run_stage(STAGE, folders, tmp_path / "align", {**SETTINGS, "epochs": 3})
    speeds = [row["triples_per_second"] for row in read_history(tmp_path / "align")]
    assert speeds[0] == pytest.approx(10 * speeds[1])
    assert speeds[1] == pytest.approx(10 * speeds[2])


def test_training_stops_when_validation_does_not_improve(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = {**SETTINGS, "learning_rate": 0.0, "epochs": 50, "patience": 2, "evaluate_every": 3}
    manifest = run_stage(STAGE, folders, tmp_path / "align", settings)
    assert manifest.facts["epochs_run"] == 9
    assert manifest.facts["best_epoch"] == 2
    assert manifest.facts["stopped_early"]


def test_edges_are_left_out_of_training_and_not_of_ranking(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    still = {**SETTINGS, "learning_rate": 0.0, "epochs": 2}
    for name, share in (("all", 0.0), ("some", 0.5)):
        run_stage(STAGE, folders, tmp_path / name, {**still, "edge_dropout": share})
    every, some = (load_file(tmp_path / n / "embeddings.safetensors") for n in ("all", "some"))
    assert all(torch.equal(every[table], some[table]) for table in ("user", "item"))
    before, after = (read_history(tmp_path / name)[1] for name in ("all", "some"))
    assert before["valid/recall@20"] == after["valid/recall@20"]
    assert before["loss/uia"] != after["loss/uia"]


def test_the_ablation_trains_without_content(folders: dict[str, Path], tmp_path: Path) -> None:
    run_stage(ABLATION, folders, tmp_path / "ablation", SETTINGS)
    assert set(load_file(tmp_path / "ablation" / "model.safetensors")) == {
        "user",
        "item",
        "trained.user",
        "trained.item",
    }
    assert "loss/cca" not in read_history(tmp_path / "ablation")[0]


def test_a_killed_run_continues_to_the_same_bits(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {**SETTINGS, "checkpoint_steps": 3, "edge_dropout": 0.3, "log_steps": 2}
    run_stage(STAGE, folders, tmp_path / "whole", settings)
    output = tmp_path / "killed"
    for _ in range(2):
        died = run_command("-c", DIES_IN_CHECKPOINT, "2", *arguments(folders, output, settings))
        assert died.returncode == -9, died.stderr
        assert not output.exists()
    finished = run_command("-m", "alignrec.align", *arguments(folders, output, settings))
    assert finished.returncode == 0, finished.stderr
    assert "resuming at epoch" in finished.stdout
    for name in ("embeddings.safetensors", "model.safetensors"):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert losses(output) == losses(tmp_path / "whole")


def test_sampled_on_two_ranks_writes_the_same_artifact(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    settings = {**SETTINGS, "mode": "sampled", "num_ranks": 2, "num_neighbors": (3, 3)}
    settings["log_steps"] = 2
    run_ranks(run_rank, 2, STAGE, folders, tmp_path / "align", settings)
    manifest = artifacts.verify(tmp_path / "align")
    assert manifest.facts["epochs_run"] == 4
    traffic = ("remote_node_share", "remote_row_share", "cache_hit_rate", "wait_seconds")
    rows = read_history(tmp_path / "align")
    assert len(rows) == 8
    for row in rows:
        assert {f"sampling/{name}" for name in traffic} <= row.keys()
        assert {"loss/bpr", "loss/cca", "loss/reg", "triples_per_second"} <= row.keys()
    # Batches are made ahead, so a row of few steps may have none.
    assert any(row["sampling/remote_node_share"] > 0 for row in rows)
    tables = load_file(tmp_path / "align" / "embeddings.safetensors")
    assert tables["user"].shape == (NUM_USERS, 8)
    assert all(np.isfinite(table.numpy()).all() for table in tables.values())
    assert set(load_file(tmp_path / "align" / "model.safetensors")) == {
        "user",
        "item",
        "gate.project.weight",
        "gate.project.bias",
        "gate.gate.weight",
        "gate.gate.bias",
        "trained.user",
        "trained.item",
    }


def test_artifacts_that_do_not_belong_together_are_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    other = write_dataset(tmp_path / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS, seed=1)
    with pytest.raises(UserError, match="built from another dataset artifact"):
        run_stage(STAGE, {**folders, "dataset": other}, tmp_path / "align", SETTINGS)
    features = write_features(tmp_path / "features", num_items=NUM_ITEMS, seed=1)
    with pytest.raises(UserError, match="built from another features artifact"):
        run_stage(STAGE, {**folders, "features": features}, tmp_path / "align", SETTINGS)
    features = results.write_features(tmp_path / "features", other)
    with pytest.raises(UserError, match="was made from the dataset"):
        run_stage(STAGE, {**folders, "features": features}, tmp_path / "align", SETTINGS)


def test_nobody_waits_while_rank_0_publishes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    publish = artifacts.publish

    def publishing(*arguments: Any, **named: Any) -> artifacts.Manifest:
        calls.append("publish")
        return publish(*arguments, **named)

    monkeypatch.setattr(training, "barrier", lambda _: calls.append("barrier"))
    monkeypatch.setattr(artifacts, "publish", publishing)
    run_stage(STAGE, folders, tmp_path / "align", {**SETTINGS, "epochs": 1})
    assert calls == ["barrier", "publish"]


def test_a_dataset_without_training_interactions_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    dataset = shutil.copytree(folders["dataset"], tmp_path / "dataset")
    train = schema.interactions_path(dataset, "train")
    pq.write_table(schema.INTERACTIONS.empty_table(), train)
    with pytest.raises(UserError, match="no training interactions"):
        run_stage(STAGE, {**folders, "dataset": dataset}, tmp_path / "align", SETTINGS)


@pytest.mark.parametrize("mode", ["full", "sampled"])
def test_a_dataset_without_validation_is_refused_before_training(
    folders: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    dataset = shutil.copytree(folders["dataset"], tmp_path / "dataset")
    pq.write_table(schema.INTERACTIONS.empty_table(), schema.interactions_path(dataset, "valid"))
    settings = {**SETTINGS, "mode": mode, "evaluate_every": 3}
    with pytest.raises(UserError, match="no user has interactions in both train and valid"):
        run_stage(STAGE, {**folders, "dataset": dataset}, tmp_path / "align", settings)
    assert not list(tmp_path.rglob("step_*"))
    assert read_history(tmp_path / "align.logs") == []


def test_a_graph_of_the_other_variant_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    inputs = {name: folders[name] for name in ("dataset", "features")}
    graph = write_graph(tmp_path / "graph", **inputs, k=4, paper_compatible=True)
    paper = {**SETTINGS, "epochs": 1, "paper_compatible": True}
    with pytest.raises(UserError, match=r"=True, but .* built with paper_compatible=False"):
        run_stage(STAGE, folders, tmp_path / "align", paper)
    with pytest.raises(UserError, match=r"=False, but .* built with paper_compatible=True"):
        run_stage(STAGE, {**folders, "graph": graph}, tmp_path / "align", SETTINGS)
    run_stage(STAGE, {**folders, "graph": graph}, tmp_path / "align", paper)
    # Without content the item-item graph is not read.
    run_stage(ABLATION, {**folders, "graph": graph}, tmp_path / "id", {**SETTINGS, "epochs": 1})


def test_features_that_are_not_finite_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    bad = write_features(tmp_path / "features", num_items=NUM_ITEMS)
    table = np.load(bad / "features.npy")
    table[4, 2] = np.nan
    np.save(bad / "features.npy", table)
    with pytest.raises(UserError, match="1 of 30 rows are not finite"):
        run_stage(STAGE, {**folders, "features": bad}, tmp_path / "align", SETTINGS)


@pytest.mark.parametrize("damage", ["missing", "torn"])
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        ("full", "graph/similar.npz"),
        ("full", "dataset/interactions/train.parquet"),
        ("sampled", "graph/META.json"),
        ("sampled", "graph/node_map/user.pt"),
        ("sampled", "graph/part_1/graph.pt"),
        ("sampled", "graph/train_items.npy"),
        ("sampled", "dataset/interactions/valid.parquet"),
    ],
)
def test_a_missing_graph_file_is_one_line_and_exit_code_2(
    folders: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mode: str,
    name: str,
    damage: str,
) -> None:
    copies = {kind: shutil.copytree(path, tmp_path / kind) for kind, path in folders.items()}
    path = tmp_path / name
    content = path.read_bytes()
    path.unlink()
    if damage == "torn":
        path.write_bytes(content[: len(content) // 2])
    code = main(STAGE, arguments(copies, tmp_path / "out", {**SETTINGS, "mode": mode}))
    told = capsys.readouterr().err
    assert code == 2
    assert str(path) in told
    assert len(told.strip().splitlines()) == 1


def test_ranks_that_were_not_started_are_missed(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {**SETTINGS, "mode": "sampled", "num_ranks": 2}
    with pytest.raises(UserError, match="torchrun --nproc-per-node 2"):
        run_stage(STAGE, folders, tmp_path / "align", settings)


def test_several_ranks_in_mode_full_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mode full is one process, but 2 ranks"):
        run_ranks(run_rank, 2, STAGE, folders, tmp_path / "align", SETTINGS)
