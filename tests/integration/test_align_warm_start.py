"""A catalogue that grows by night: today's embeddings go on from yesterday's."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from alignrec import artifacts
from alignrec.align import STAGE
from alignrec.data import schema
from alignrec.errors import StageFailure, UserError
from alignrec.stage import EARLIER, Context
from alignrec.telemetry import read_history
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.growth import write_features_part, write_part
from alignrec.testing.processes import DIES_IN_CHECKPOINT, run_ranks

pytestmark = pytest.mark.integration

Folders = dict[str, Path]
DAYS = {"first": (108, 270), "second": (120, 300)}  # items and users
SETTINGS = {"embedding_dim": 8, "batch_size": 500, "epochs": 3, "learning_rate": 0.01}


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Folders]:
    root = tmp_path_factory.mktemp("days")
    items, users = DAYS["second"]
    second = write_dataset(root / "dataset", num_items=items, num_users=users)
    items, users = DAYS["first"]
    first = write_part(root / "first", second, num_items=items, num_users=users)
    features = write_features(root / "features", num_items=DAYS["second"][0])
    cut = write_features_part(root / "cut", features, dataset=first)
    return {
        "first": with_graph(root / "first_graph", first, cut),
        "second": with_graph(root / "second_graph", second, features),
    }


def with_graph(folder: Path, dataset: Path, features: Path) -> Folders:
    graph = write_graph(folder, dataset=dataset, features=features, k=4, num_partitions=3)
    return {"dataset": dataset, "features": features, "graph": graph}


@pytest.fixture(scope="module")
def yesterday(days: dict[str, Folders], tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("yesterday") / "align"
    run_stage(days["first"], output, {**SETTINGS, "epochs": 40})
    return output


def run_stage(folders: Folders, output: Path, settings: dict[str, Any]) -> None:
    """Run the stage on this rank; the artifact is there when rank 0 has returned."""
    config = STAGE.load_config(settings)
    context = Context(
        inputs=folders,
        output=output,
        fingerprint=STAGE.fingerprint(config, folders, output),
        log_dir=output.with_name(output.name + ".logs"),
    )
    STAGE.load_run()(config, context)


def going_on(source: Path, **settings: Any) -> dict[str, Any]:
    return {**SETTINGS, "initial": {"embeddings": str(source)}, **settings}


def course(output: Path) -> list[float]:
    return [row["valid/recall@20"] for row in read_history(output)]


def told(output: Path) -> list[dict[str, Any]]:
    """Return the history without what depends on the clock."""
    timed = ("time", "triples_per_second")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_history(output)]


def test_the_second_day_begins_near_where_the_first_ended(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    run_stage(days["second"], tmp_path / "nothing", {**SETTINGS, "epochs": 15})
    run_stage(days["second"], tmp_path / "warm", going_on(yesterday))
    assert course(tmp_path / "warm")[0] > max(course(tmp_path / "nothing"))
    before = artifacts.read(yesterday).facts["valid"]["recall@20"]
    assert max(course(tmp_path / "warm")) > 0.85 * before  # other users, other items
    facts = artifacts.read(tmp_path / "warm").facts[EARLIER]
    assert (facts["new_items"], facts["new_users"], facts["gate"]) == (12, 30, "kept")
    assert facts["identity"] == artifacts.read(yesterday).identity


def test_what_it_goes_on_from_is_kept_where_training_only_loses(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    worse = going_on(yesterday, learning_rate=1e4, patience=2, epochs=9)
    run_stage(days["second"], tmp_path / "worse", worse)
    run_stage(days["second"], tmp_path / "still", going_on(yesterday, learning_rate=0.0, epochs=1))
    facts = artifacts.read(tmp_path / "worse").facts
    assert (facts["best_epoch"], facts["epochs_run"]) == (-1, 2)
    first = read_history(tmp_path / "worse")[0]
    assert (first["step"], first["epoch"]) == (0, -1)
    assert facts["valid"]["recall@20"] == first["valid/recall@20"]
    rows = [load_file(tmp_path / name / "embeddings.safetensors") for name in ("worse", "still")]
    for key, value in rows[0].items():
        assert torch.equal(value, rows[1][key])


def test_both_modes_start_with_the_same_rows_on_any_number_of_ranks(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    # A learning rate of zero leaves the start as it is.
    still = going_on(yesterday, learning_rate=0.0, epochs=1)
    sampled = {**still, "mode": "sampled"}
    run_stage(days["second"], tmp_path / "full", still)
    run_stage(days["second"], tmp_path / "1", sampled)
    two = {**sampled, "num_ranks": 2}
    run_ranks(run_stage, 2, days["second"], tmp_path / "2", two)
    before = load_file(yesterday / "model.safetensors")
    for name in ("model.safetensors", "embeddings.safetensors"):
        wanted = load_file(tmp_path / "full" / name)
        for other in ("1", "2"):
            found = load_file(tmp_path / other / name)
            assert found.keys() == wanted.keys()
            for key, value in wanted.items():
                torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)
    after = load_file(tmp_path / "full" / "model.safetensors")
    for key in ("user", "item"):
        trained = before[f"trained.{key}"][:, 0].bool()
        assert torch.equal(after[key][: len(trained)][trained], before[key][trained])
        assert after[f"trained.{key}"][: len(trained)][trained].all()  # today's or not
    assert all(torch.equal(after[key], before[key]) for key in before if key.startswith("gate."))


def test_a_chain_in_one_folder_is_reused_and_goes_on_when_the_dataset_grows(
    days: dict[str, Folders], tmp_path: Path
) -> None:
    output = tmp_path / "align"
    settings = going_on(output, epochs=1)
    settings["initial"]["optional"] = True
    config = STAGE.load_config(settings)
    identities = []
    for day in ("first", "second"):
        run_stage(days[day], output, settings)
        manifest = artifacts.read(output)
        assert manifest.fingerprint == STAGE.fingerprint(config, days[day], output)
        identities.append(manifest.identity)
    assert artifacts.read(output).facts[EARLIER]["identity"] == identities[0]
    # Other settings go on from what is there.
    other = STAGE.load_config({**settings, "uia_weight": 0.2})
    assert STAGE.fingerprint(other, days["second"], output) != artifacts.read(output).fingerprint
    with pytest.raises(UserError, match="what it went on from is gone"):
        run_stage(days["second"], output, settings)
    assert artifacts.read(output).identity == identities[1]


def test_a_killed_run_goes_on_to_the_same_bits(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    settings = going_on(yesterday, checkpoint_steps=1)  # killed in its first epoch
    run_stage(days["second"], tmp_path / "whole", settings)
    words = [part for kind, path in days["second"].items() for part in (f"--{kind}", str(path))]
    words += [
        "--output",
        str(tmp_path / "killed"),
        "--set",
        f"align.initial.embeddings={yesterday}",
    ]
    plain = {k: v for k, v in settings.items() if k != "initial"}
    words += [part for k, v in plain.items() for part in ("--set", f"align.{k}={v}")]
    died = subprocess.run(
        [sys.executable, "-c", DIES_IN_CHECKPOINT, "2", *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert died.returncode == -9, died.stderr
    run_stage(days["second"], tmp_path / "killed", settings)
    for name in ("embeddings.safetensors", "model.safetensors"):
        same = [(tmp_path / run / name).read_bytes() for run in ("whole", "killed")]
        assert same[0] == same[1]
    assert told(tmp_path / "killed") == told(tmp_path / "whole")
    assert [row["epoch"] for row in told(tmp_path / "killed")] == [-1, 0, 1, 2]


def test_features_of_another_kind_draw_the_gate_anew(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    features = write_features(tmp_path / "features", num_items=DAYS["second"][0], dim=16)
    wider = with_graph(tmp_path / "graph", days["second"]["dataset"], features)
    run_stage(wider, tmp_path / "align", going_on(yesterday, epochs=1))
    assert artifacts.read(tmp_path / "align").facts[EARLIER]["gate"] == "drawn anew"


def test_the_gate_of_a_drifting_table_is_drawn_anew(
    days: dict[str, Folders], tmp_path: Path
) -> None:
    short = {**SETTINGS, "epochs": 1}
    inputs = {name: days["first"][name] for name in ("dataset", "features")}
    graph = write_graph(tmp_path / "graph", **inputs, k=4, paper_compatible=True)
    paper = {**inputs, "graph": graph}
    run_stage(paper, tmp_path / "paper", {**short, "paper_compatible": True})
    run_stage(days["second"], tmp_path / "align", going_on(tmp_path / "paper", epochs=1))
    assert artifacts.read(tmp_path / "align").facts[EARLIER]["gate"] == "drawn anew"


def test_a_start_that_was_replaced_meanwhile_is_refused(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start"
    settings = going_on(start)
    settings["initial"]["optional"] = True
    config = STAGE.load_config(settings)
    shutil.copytree(yesterday, start)
    output = tmp_path / "align"
    mark = STAGE.fingerprint(config, days["second"], output)
    shutil.rmtree(start)  # optional: it would start from nothing under this fingerprint
    context = Context(days["second"], output, mark, tmp_path / "logs")
    with pytest.raises(StageFailure, match="was replaced since this run was started"):
        STAGE.load_run()(config, context)
    assert not artifacts.partial_path(output).exists()


def test_embeddings_of_another_catalogue_are_refused(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    dataset = shutil.copytree(days["second"]["dataset"], tmp_path / "dataset")
    items = schema.read_items(dataset)
    keys = items["item_key"].to_pylist()
    keys[:2] = keys[1], keys[0]
    exchanged = items.set_column(1, schema.ITEMS.field("item_key"), pa.array(keys))
    pq.write_table(exchanged, dataset / "items.parquet")
    other = {**days["second"], "dataset": dataset}
    with pytest.raises(UserError, match="items have other keys than those of"):
        run_stage(other, tmp_path / "align", going_on(yesterday))
    assert not artifacts.partial_path(tmp_path / "align").exists()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"embedding_dim": 16}, "has 8 numbers a row, but embedding_dim=16"),
        ({"content": False}, "was trained with content, this run is without"),
    ],
)
def test_embeddings_that_do_not_fit_are_refused(
    days: dict[str, Folders],
    yesterday: Path,
    tmp_path: Path,
    change: dict[str, Any],
    fault: str,
) -> None:
    with pytest.raises(UserError, match=fault):
        run_stage(days["second"], tmp_path / "align", {**going_on(yesterday), **change})


def test_embeddings_of_a_larger_or_unknown_catalogue_or_damaged_ones_are_refused(
    days: dict[str, Folders], yesterday: Path, tmp_path: Path
) -> None:
    larger = tmp_path / "larger"
    run_stage(days["second"], larger, {**SETTINGS, "epochs": 1})
    with pytest.raises(UserError, match="numbers only ever grow"):
        run_stage(days["first"], tmp_path / "align", going_on(larger))
    with pytest.raises(UserError, match="no embeddings here"):
        run_stage(days["second"], tmp_path / "align", going_on(tmp_path / "absent"))
    damaged = shutil.copytree(yesterday, tmp_path / "damaged")
    (damaged / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        run_stage(days["second"], tmp_path / "align", going_on(damaged))
    unknown = tmp_path / "unknown"
    with artifacts.writing(
        unknown, kind="embeddings", fingerprint="", config={}, inputs={}
    ) as draft:
        save_file(load_file(yesterday / "model.safetensors"), draft.path / "model.safetensors")
    with pytest.raises(UserError, match="does not tell the keys of its rows"):
        run_stage(days["second"], tmp_path / "align", going_on(unknown))
