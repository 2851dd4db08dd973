"""The stage as a whole on a local Ray: contract, determinism, restart, bad input, real data."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
import yaml

from alignrec import artifacts, stage
from alignrec.data import schema
from alignrec.data.schema import SPLITS
from alignrec.errors import StageFailure
from alignrec.testing import synthetic
from data_prep import STAGE, engine
from data_prep.images import ImageRules
from data_prep.pictures import PictureRules
from data_prep.shards import ShardPlan, TextRules

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("ALIGNREC_DATA", ROOT.parent / "shared" / "data"))
NUM_ITEMS = 150


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    section = {"source": "synthetic", "num_cpus": 2, "object_store_bytes": 100_000_000}
    with engine.session(STAGE.load_config(section)):
        yield


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    synthetic.write_catalogue(folder, num_items=NUM_ITEMS, num_users=60, image_size=300)
    return folder


def table_section(folder: Path, **changes: Any) -> dict[str, Any]:
    section: dict[str, Any] = {
        "items": {"path": str(folder / "items.parquet")},
        "interactions": {"path": str(folder / "interactions.parquet")},
        "images": {"max_side": 64},
        "shards": {"max_samples": 11},
    }
    return {**section, **changes}


def prepare(output: Path, section: dict[str, Any]) -> int:
    recipe = output.with_name(output.name + ".yaml")
    recipe.write_text(yaml.safe_dump({"data_prep": section}))
    return stage.main(STAGE, ["--output", str(output), "--recipe", str(recipe)])


def content(output: Path) -> dict[str, str]:
    """Return the checksums of all but what names the raw files' times of change."""
    files = artifacts.verify(output).files
    provenance = ("chunks.parquet", "pictures.parquet")
    return {name: entry["sha256"] for name, entry in files.items() if name not in provenance}


@pytest.fixture(scope="module")
def dataset(raw: Path, local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("prepared") / "dataset"
    assert prepare(output, table_section(raw)) == 0
    return output


def test_the_artifact_is_as_its_contract_says(dataset: Path) -> None:
    counts = artifacts.verify(dataset).counts
    kinds = {
        "items": schema.ITEMS, "users": schema.USERS, "samples": schema.SAMPLES,
        "quarantine": schema.QUARANTINE,
        **{f"interactions/{split}": schema.INTERACTIONS for split in SPLITS},
    }  # fmt: skip
    for name, kind in kinds.items():
        assert pq.read_schema(dataset / f"{name}.parquet").equals(kind), name
    items, users = schema.read_items(dataset), schema.read_users(dataset)
    assert items["item_index"].to_pylist() == list(range(NUM_ITEMS)) == list(
        range(counts["num_items"])
    )  # fmt: skip
    assert items["item_key"].to_pylist() == [synthetic.item_key(i) for i in range(NUM_ITEMS)]
    assert users["user_index"].to_pylist() == list(range(counts["num_users"]))
    assert counts["num_without_image"] == items["has_image"].to_pylist().count(False) == 1
    assert counts["num_without_text"] == items["has_text"].to_pylist().count(False) == 1
    assert counts["num_shards"] == len(list((dataset / "shards").iterdir())) == 14
    assert counts["num_quarantined"] == 0


def test_every_interaction_of_the_log_is_in_one_split(dataset: Path, raw: Path) -> None:
    users = schema.read_users(dataset)["user_key"].to_pylist()
    items = schema.read_items(dataset)["item_key"].to_pylist()
    found = []
    for split in SPLITS:
        user, item = schema.read_interactions(dataset, split)
        order = np.lexsort((item, user))
        assert (order == np.arange(len(order))).all()
        found += [(users[u], items[i]) for u, i in zip(user, item, strict=True)]
    log = pq.read_table(raw / "interactions.parquet").to_pylist()
    assert sorted(found) == sorted((row["user_id"], row["item_id"]) for row in log)
    first_rows = list(dict.fromkeys(row["user_id"] for row in log))
    assert users == first_rows


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its tars open
def test_webdataset_reads_the_shards(dataset: Path) -> None:
    names = schema.read_samples(dataset)["shard"].unique().to_pylist()
    samples = list(webdataset.WebDataset([str(dataset / n) for n in names], shardshuffle=False))
    assert [int(sample["__key__"]) for sample in samples] == list(range(NUM_ITEMS))
    items = schema.read_items(dataset).to_pylist()
    for sample, item in zip(samples, items, strict=True):
        document = json.loads(sample["json"])
        assert document["item_key"] == item["item_key"]
        assert document["text"] == item["text"]
        assert ("jpg" in sample) == item["has_image"]


def test_one_worker_writes_the_same_bytes_as_two(dataset: Path, raw: Path, tmp_path: Path) -> None:
    assert prepare(tmp_path / "one", table_section(raw, num_cpus=1)) == 0
    assert content(tmp_path / "one") == content(dataset)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(
    dataset: Path, raw: Path, tmp_path: Path
) -> None:
    output = tmp_path / "killed"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data_prep": table_section(raw, num_cpus=1)}))
    parts = artifacts.partial_path(output) / artifacts.WORK / "parts"
    command = [sys.executable, "-m", "data_prep", "--output", str(output), "--recipe", str(recipe)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not list(parts.glob("*.json")) and process.poll() is None:
            try:
                process.wait(0.02)
            except subprocess.TimeoutExpired:
                continue
        process.send_signal(signal.SIGKILL)
    assert not output.exists()
    done = list(parts.glob("*.json"))
    assert done
    shards = artifacts.partial_path(output) / "shards"
    before = {path.name: path.stat().st_mtime_ns for path in shards.glob("*.tar")}
    assert prepare(output, table_section(raw)) == 0
    assert content(output) == content(dataset)
    finished = [json.loads(path.read_text()) for path in parts.glob("*.json")]
    assert not finished  # the work folder is gone
    kept = {path.name: path.stat().st_mtime_ns for path in (output / "shards").iterdir()}
    assert sum(kept[name] == before[name] for name in before if name in kept) >= len(done)


def spoil(raw: Path, folder: Path) -> None:
    """Copy a catalogue with bad rows and pictures added: 3 items, 2 pictures, 4 log rows."""
    (folder / "images").mkdir(parents=True)
    for picture in (raw / "images").iterdir():
        (folder / "images" / picture.name).hardlink_to(picture)
    for item in (3, 5):
        (folder / "images" / f"{synthetic.item_key(item)}.jpg").unlink()
    (folder / "images" / f"{synthetic.item_key(5)}.jpg").write_bytes(b"\xff\xd8 broken")
    items = pq.read_table(raw / "items.parquet")
    bad_items = items.slice(0, 3).set_column(0, "item_id", pa.array([None, "", "item-0000007"]))
    pq.write_table(pa.concat_tables([bad_items.slice(0, 2), items, bad_items.slice(2)]),
                   folder / "items.parquet")  # fmt: skip
    log = pq.read_table(raw / "interactions.parquet")
    keys = {"user_id": [None, "user-0000001", "user-0000001", ""], "item_id": ["x", "y", None, "z"]}
    bad_log = pa.table({**keys, "timestamp": pa.array([1, 2, 3, 4])})
    pq.write_table(pa.concat_tables([bad_log, log.cast(bad_log.schema)]),
                   folder / "interactions.parquet")  # fmt: skip


def test_bad_rows_and_pictures_are_left_out_and_nothing_else(
    dataset: Path, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "spoilt"
    spoil(raw, folder)
    output = tmp_path / "out"
    assert prepare(output, table_section(folder, max_bad_fraction=0.0)) == 1
    assert "missing_key 2, duplicate_key 1" in capsys.readouterr().err
    assert prepare(output, table_section(folder, max_bad_fraction=0.05)) == 0
    assert artifacts.read(output).facts["quarantine"] == {
        "items": {"missing_key": 2, "duplicate_key": 1},
        "images": {"image_missing": 1, "image_unknown_format": 1},
        "interactions": {"missing_user": 2, "missing_item": 1, "unknown_item": 1},
    }  # fmt: skip
    for name in ("users.parquet", *(f"interactions/{split}.parquet" for split in SPLITS)):
        assert (output / name).read_bytes() == (dataset / name).read_bytes()
    good, spoilt = schema.read_items(dataset), schema.read_items(output)
    assert spoilt.drop_columns(["has_image"]).equals(good.drop_columns(["has_image"]))
    differ = np.flatnonzero(good["has_image"].to_numpy() != spoilt["has_image"].to_numpy())
    assert differ.tolist() == [3, 5]


def test_a_wrong_folder_of_pictures_stops_the_run_early(
    raw: Path, local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = table_section(raw, images={"root": str(tmp_path)}, num_cpus=1)
    assert prepare(tmp_path / "out", section) == 1
    error = capsys.readouterr().err
    assert f"images of {tmp_path}" in error
    assert "image_missing" in error
    listed = pq.read_table(tmp_path / "out.logs" / "quarantine.parquet")
    assert 0 < len(listed) < NUM_ITEMS - 1
    assert prepare(tmp_path / "out", {**section, "max_bad_fraction": 1.0}) == 0
    assert artifacts.read(tmp_path / "out").counts["num_quarantined"] == NUM_ITEMS - 1


def test_a_failing_task_is_reported_with_its_cause(local_ray: None, tmp_path: Path) -> None:
    rules = PictureRules(ImageRules("/", (), 64, 4, 90, 1000, 1000), "", read_threads=1)
    plan = ShardPlan(tmp_path, tmp_path / "work", rules, TextRules("|", 9, 9))
    with pytest.raises(StageFailure, match=r"FileNotFoundError: .*000000\.parquet"):
        engine.run_shards(plan, [0], num_cpus=1, finished=print)


def test_items_without_interactions_can_be_left_out(
    raw: Path, local_ray: None, tmp_path: Path
) -> None:
    section = table_section(raw)
    section["items"]["keep"] = "interacted"
    section["interactions"] |= {"min_item_interactions": 8}
    assert prepare(tmp_path / "core", section) == 0
    items = schema.read_items(tmp_path / "core", ["item_index"])["item_index"].to_numpy()
    used = np.concatenate([schema.read_interactions(tmp_path / "core", s)[1] for s in SPLITS])
    counts = np.bincount(used)
    assert len(items) == len(counts) < NUM_ITEMS
    assert counts.min() >= 8
    assert schema.read_samples(tmp_path / "core")["item_index"].to_pylist() == items.tolist()


def test_the_synthetic_source_needs_no_files(local_ray: None, tmp_path: Path) -> None:
    section = {"source": "synthetic", "synthetic": {"num_items": 40, "num_users": 30}}
    assert prepare(tmp_path / "a", section) == 0
    assert prepare(tmp_path / "b", section) == 0
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert artifacts.read(tmp_path / "a").counts["num_items"] == 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"items": {"path": "absent.parquet"}}, "no such file"),
        ({"itmes": {}}, "data_prep.itmes is not a setting"),
        ({"images": {"max_side": "large"}}, "must be a whole number"),
        ({"items": {"path": "{raw}/items.parquet", "columns": {"title": "titel"}}}, "title"),
        ({"interactions": {"path": "{raw}/empty.parquet"}}, "is empty"),
        ({"interactions": {"path": "{raw}/broken.parquet"}}, "cannot be read as parquet"),
        ({"interactions": {"path": "{raw}/interactions.parquet",
                           "columns": {"user": "usr_id"}}}, "Did you mean user_id"),
    ],
)  # fmt: skip
def test_the_users_mistakes_are_one_line_each(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: Any, message: str
) -> None:
    (raw / "broken.parquet").write_bytes(b"PAR1 broken PAR1")
    log = pq.read_schema(raw / "interactions.parquet")
    pq.write_table(log.empty_table(), raw / "empty.parquet")
    filled = json.loads(json.dumps(changes).replace("{raw}", str(raw)))
    assert prepare(tmp_path / "out", table_section(raw, **filled)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not (DATA / "ml1m").is_dir(), reason=f"no MovieLens catalogue in {DATA}")
def test_the_movielens_catalogue(local_ray: None, tmp_path: Path) -> None:
    section = {
        "items": {
            "path": str(DATA / "ml1m" / "items.parquet"),
            "columns": {"text": ["title", "genres", "director", "cast", "plot"]},
        },
        "interactions": {"path": str(DATA / "ml1m" / "interactions.parquet")},
    }
    assert prepare(tmp_path / "movielens", section) == 0
    manifest = artifacts.verify(tmp_path / "movielens")
    counts = manifest.counts
    assert (counts["num_items"], counts["num_users"]) == (3260, 6040)
    assert counts["num_train"] + counts["num_valid"] + counts["num_test"] == 998_539
    assert (counts["num_without_image"], counts["num_quarantined"]) == (4, 0)
    assert manifest.facts["images"]["kept_as_they_came"] == 3256


@pytest.mark.skipif(not (DATA / "ml1m-sparse").is_dir(), reason=f"no MMRec benchmark in {DATA}")
def test_the_mmrec_benchmark(tmp_path: Path) -> None:
    folder = DATA / "ml1m-sparse"
    section = {
        "source": "mmrec",
        "mmrec": {
            "interactions": str(folder / "ml1m-sparse.inter"),
            "features": [str(folder / "image_feat.npy"), str(folder / "text_feat.npy")],
            "item_keys": str(folder / "item_ids.csv"),
        },
    }
    assert prepare(tmp_path / "sparse", section) == 0
    counts = artifacts.verify(tmp_path / "sparse").counts
    found = [counts[name] for name in ("num_users", "num_items", *(f"num_{s}" for s in SPLITS))]
    assert found == [5159, 2804, 116_355, 15_018, 15_018]
    assert len(schema.read_samples(tmp_path / "sparse")) == 0


def test_a_leak_between_the_splits_of_an_import_is_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.save(tmp_path / "f.npy", np.ones((3, 2), dtype=np.float32))
    (tmp_path / "x.inter").write_text("userID\titemID\tx_label\n0\t1\t0\n0\t2\t1\n0\t1\t2\n")
    mmrec = {"interactions": str(tmp_path / "x.inter"), "features": [str(tmp_path / "f.npy")]}
    assert prepare(tmp_path / "out", {"source": "mmrec", "mmrec": mmrec}) == 2
    assert "user 0, item 1 in train and test" in capsys.readouterr().err
