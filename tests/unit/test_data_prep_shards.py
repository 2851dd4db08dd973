"""Shards: every item once, exact offsets, equal bytes, finished shards are not made again."""

import io
import json
import shutil
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignrec import artifacts
from alignrec.artifacts import Draft
from data_prep import catalogue, fetching, locations, packing, shards, tars
from data_prep.config import ImagesConfig, ItemColumns
from data_prep.images import BadImage, ImageRules
from data_prep.locations import RawFile
from data_prep.pictures import PictureRules
from data_prep.quarantine import Quarantine, Reason
from data_prep.shards import ShardPlan, TextRules
from data_prep.tars import TarWriter

NUM_ITEMS = 23
COLUMNS = ItemColumns(text=("title", "brand"))
NOTHING_REMOVED = pa.table(
    {"item_index": pa.array([], pa.int64()), "item_key": pa.array([], pa.string())}
)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A catalogue with one broken picture, one missing file and one item without either."""
    folder = tmp_path / "raw"
    folder.mkdir()
    rng = np.random.default_rng(0)
    references: list[str | None] = []
    for item in range(NUM_ITEMS):
        image = Image.fromarray(rng.integers(0, 255, (20, 30 + item, 3), dtype=np.uint8))
        image.save(folder / f"{item}.jpg")
        references.append(f"{item}.jpg")
    (folder / "4.jpg").write_bytes(b"broken")
    references[7] = "absent.jpg"
    references[9] = None
    titles = [None if item == 9 else f"Title &amp; {item}" for item in range(NUM_ITEMS)]
    table = pa.table(
        {
            "item_id": [f"k{item}" for item in range(NUM_ITEMS)],
            "title": titles,
            "brand": pa.array([None] * NUM_ITEMS, pa.string()),
            "image": references,
        }
    )
    pq.write_table(table, folder / "items.parquet", row_group_size=5)
    return folder


def make_plan(raw: Path, folder: Path, base: Path | None = None) -> ShardPlan:
    rules = PictureRules(ImageRules.of(ImagesConfig(), root=str(raw)), "", read_threads=3)
    return ShardPlan(folder, folder / "work", rules, TextRules(" | ", 300, 2000), base)


def write_chunks(
    files: list[RawFile],
    plan: ShardPlan,
    *,
    max_rows: int,
    removed: pa.Table = NOTHING_REMOVED,
) -> int:
    keys = catalogue.read_keys(files, COLUMNS, Quarantine())
    numbers = catalogue.Numbering.of(keys.good).assign(np.ones(len(keys.good), dtype=bool))
    return catalogue.write_chunks(
        files, COLUMNS, keys=keys, numbers=numbers, removed=removed,
        folder=plan.chunk_path(0).parent, max_rows=max_rows,
    )  # fmt: skip


def prepare(raw: Path, folder: Path, *, max_rows: int) -> ShardPlan:
    plan = make_plan(raw, folder)
    files = locations.find([str(raw / "items.parquet")])
    num_chunks = write_chunks(files, plan, max_rows=max_rows)
    for chunk in range(num_chunks):
        shards.write_shard({"chunk": chunk}, plan)
    return plan


def parts(plan: ShardPlan, table: str) -> list[dict[str, Any]]:
    paths = sorted(plan.part_path(0, table).parent.glob(f"*.{table}.parquet"))
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


@pytest.mark.parametrize("max_rows", [1, 5, 7, 23, 100])
def test_every_item_is_in_the_shards_once_and_in_order(
    raw: Path, tmp_path: Path, max_rows: int
) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=max_rows)
    samples = parts(plan, "samples")
    assert [row["item_index"] for row in samples] == list(range(NUM_ITEMS))
    assert [row["item_key"] for row in parts(plan, "items")] == [f"k{i}" for i in range(NUM_ITEMS)]
    assert len(list((tmp_path / "out" / "shards").iterdir())) == -(-NUM_ITEMS // max_rows)


def test_offsets_point_at_the_payloads(raw: Path, tmp_path: Path) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=7)
    for row in parts(plan, "samples"):
        data = (plan.artifact / row["shard"]).read_bytes()
        key = f"{row['item_index']:012d}"
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            text = tar.extractfile(f"{key}.json").read()
            names = tar.getnames()
            image = tar.extractfile(f"{key}.jpg").read() if f"{key}.jpg" in names else b""
        start = row["json_offset"]
        assert data[start : start + row["json_bytes"]] == text
        start = row["image_offset"]
        assert data[start : start + row["image_bytes"]] == image
        assert row["crc32"] == zlib.crc32(image + text)
        assert bool(image) == (row["item_index"] not in (4, 7, 9))


def test_sample_text_and_item_rows(raw: Path, tmp_path: Path) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=100)
    items = parts(plan, "items")
    assert items[3] == {
        "item_index": 3, "item_key": "k3", "title": "Title & 3", "text": "Title & 3",
        "has_image": True, "has_text": True, "removed": False,
    }  # fmt: skip
    assert not items[9]["has_text"]
    sample = parts(plan, "samples")[3]
    data = (plan.artifact / sample["shard"]).read_bytes()
    start = sample["json_offset"]
    assert json.loads(data[start : start + sample["json_bytes"]]) == {
        "item_key": "k3", "title": "Title & 3", "text": "Title & 3",
        "attributes": {"title": "Title & 3"},
    }  # fmt: skip


def test_bad_pictures_are_listed_and_their_items_stay(raw: Path, tmp_path: Path) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=7)
    verdicts = {row["item_index"]: row["reason"] for row in parts(plan, "pictures")}
    assert {index: reason for index, reason in verdicts.items() if reason} == {
        4: "image_unknown_format", 7: "image_missing",
    }  # fmt: skip
    assert verdicts.keys() == set(range(NUM_ITEMS)) - {9}
    without = [row["item_index"] for row in parts(plan, "items") if not row["has_image"]]
    assert without == [4, 7, 9]


def test_bytes_depend_on_the_samples_alone(raw: Path, tmp_path: Path) -> None:
    first = prepare(raw, tmp_path / "a", max_rows=7)
    second = prepare(raw, tmp_path / "b", max_rows=7)
    for path in sorted(first.artifact.rglob("*.*")):
        if path.is_file() and path.name != "done.json":
            other = second.artifact / path.relative_to(first.artifact)
            assert other.read_bytes() == path.read_bytes(), path


def test_a_finished_shard_is_not_made_again(raw: Path, tmp_path: Path) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=7)
    before = {p: p.stat().st_mtime_ns for p in (plan.artifact / "shards").iterdir()}
    for picture in raw.glob("*.jpg"):
        picture.unlink()  # would be noticed
    for chunk in range(4):
        assert shards.write_shard({"chunk": chunk}, plan)["chunk"] == chunk
    assert {p: p.stat().st_mtime_ns for p in (plan.artifact / "shards").iterdir()} == before


@pytest.mark.parametrize("is_killed_again", [False, True])
def test_what_was_bad_for_a_while_is_tried_again_and_the_rest_is_kept(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, is_killed_again: bool
) -> None:
    read: list[str] = []
    original = fetching.Fetcher.read

    def watched(self: fetching.Fetcher, reference: str) -> bytes:
        read.append(reference)
        if reference == "12.jpg" and len(read) <= NUM_ITEMS:
            raise BadImage(Reason.IMAGE_TIMED_OUT, "slow", transient=True)
        return original(self, reference)

    monkeypatch.setattr(fetching.Fetcher, "read", watched)
    (raw / "20.jpg").rename(raw / "away.jpg")
    plan = prepare(raw, tmp_path / "out", max_rows=5)
    read += [""] * NUM_ITEMS
    assert [shards.may_become_better(chunk, plan) for chunk in range(5)] == [
        False, False, True, False, False,
    ]  # fmt: skip
    (raw / "away.jpg").rename(raw / "20.jpg")  # the file system is back
    assert shards.may_become_better(4, plan)
    del read[:-NUM_ITEMS]
    for chunk in (2, 4):
        shards.take_back(chunk, plan)
        if is_killed_again:
            monkeypatch.setattr(shards, "_write_done", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                shards.write_shard({"chunk": chunk}, plan)
            monkeypatch.undo()
            monkeypatch.setattr(fetching.Fetcher, "read", watched)
        assert shards.write_shard({"chunk": chunk}, plan)["fetched"] == 1
    assert {*read} == {"", "12.jpg", "20.jpg"}
    fresh = prepare(raw, tmp_path / "fresh", max_rows=5)
    chunks = [packing.finished_chunks(made, 5) for made in (plan, fresh)]
    assert chunks[0] == chunks[1]
    for made, listed in zip((plan, fresh), chunks, strict=True):
        packing.join_tables(made, listed, Draft(made.artifact))
        shutil.rmtree(made.work)
    # Shards of the outage are gone, too.
    assert artifacts.checksums(plan.artifact) == artifacts.checksums(fresh.artifact)


def test_a_shard_killed_half_way_leaves_nothing_behind(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(raw, tmp_path / "out")
    files = locations.find([str(raw / "items.parquet")])
    write_chunks(files, plan, max_rows=100)
    monkeypatch.setattr(shards, "_item_row", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        shards.write_shard({"chunk": 0}, plan)
    assert list((plan.artifact / "shards").iterdir()) == []
    assert not plan.is_done(0)


def test_a_torn_tar_has_the_name_that_publishing_drops(tmp_path: Path) -> None:
    with TarWriter(tmp_path) as tar:
        tar.add("a.json", b"{}")
        torn = list(tmp_path.iterdir())  # what a killed worker leaves
        assert torn == list(tmp_path.glob(".*.writing"))


@pytest.mark.parametrize("size", [0, 1, 511, 512, 123_456_789, 8**11 - 1])
def test_headers_are_those_of_tarfile(size: int) -> None:
    for name in ("000000000000.jpg", "999999999999.json", "a" * 100):
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.mtime = size, 0o644, 0
        assert tars.header(name, size) == info.tobuf(tarfile.USTAR_FORMAT)


def test_tables_have_the_schema_of_the_contract(raw: Path, tmp_path: Path) -> None:
    plan = prepare(raw, tmp_path / "out", max_rows=100)
    for name, kind in shards.TABLES.items():
        assert pq.read_schema(plan.part_path(0, name)).equals(kind)


def test_rows_without_a_usable_key_go_to_quarantine(tmp_path: Path) -> None:
    keys = ["a", None, "", "  ", "b", "a", "c\x00", "x" * 300, "b", "d"]
    pq.write_table(pa.table({"item_id": keys}), tmp_path / "items.parquet")
    quarantine = Quarantine()
    found = catalogue.read_keys(
        locations.find([str(tmp_path / "items.parquet")]),
        ItemColumns(title=None, text=(), image=None),
        quarantine,
    )
    assert found.good.to_pylist() == ["a", "b", "d"]
    assert np.flatnonzero(found.is_good).tolist() == [0, 4, 9]
    assert quarantine.reasons() == {
        "items": {"missing_key": 3, "invalid_key": 2, "duplicate_key": 2}
    }  # fmt: skip
