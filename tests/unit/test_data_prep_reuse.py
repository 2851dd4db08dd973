"""What a version takes from the one before: shards, pictures, verdicts; never a damaged one."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignrec.artifacts import Draft
from data_prep import catalogue, fetching, locations, packing, pictures, reuse, shards
from data_prep.config import ImagesConfig, ItemColumns
from data_prep.images import BadImage, ImageRules
from data_prep.pictures import PictureRules
from data_prep.quarantine import Quarantine, Reason
from data_prep.shards import ShardPlan, TextRules

NUM_ITEMS = 12
MAX_ROWS = 4
COLUMNS = ItemColumns(text=("title",))
Change = Callable[[dict[str, list[Any]]], None]


class Catalogue:
    """A raw catalogue whose versions are made one after the other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.raw = folder / "raw"
        self.raw.mkdir()
        rng = np.random.default_rng(0)
        for item in range(NUM_ITEMS):
            pixels = rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.raw / f"{item}.jpg")
        self.rows = {
            "item_id": [f"k{item}" for item in range(NUM_ITEMS)],
            "title": [f"Title {item}" for item in range(NUM_ITEMS)],
            "image": [f"{item}.jpg" for item in range(NUM_ITEMS)],
        }
        self.revision = ""
        self.images = ImagesConfig()
        self.root = str(self.raw)
        self.summaries: list[dict[str, Any]] = []
        self.quarantine = Quarantine()

    def make(self, name: str, base: str | None = None, *, max_rows: int = MAX_ROWS) -> Path:
        """Make a version; ``summaries`` say what each chunk cost."""
        pq.write_table(pa.table(self.rows), self.raw / "items.parquet")
        files = locations.find([str(self.raw / "items.parquet")])
        keys = catalogue.read_keys(files, COLUMNS, Quarantine())
        earlier = None
        if base is not None:
            table = pq.read_table(self.folder / base / "items.parquet")
            earlier = table["item_key"].combine_chunks()
        numbering = catalogue.Numbering.of(keys.good, earlier)
        numbers = numbering.assign(np.ones(len(keys.good), dtype=bool))
        output = self.folder / name
        rules = PictureRules(ImageRules.of(self.images, root=self.root), self.revision, 2)
        plan = ShardPlan(
            output, self.folder / f"{name}.work", rules, TextRules("|", 99, 99),
            base=None if base is None else self.folder / base,
        )  # fmt: skip
        num_chunks = catalogue.write_chunks(
            files, COLUMNS, keys=keys, numbers=numbers, removed=numbering.removed(numbers),
            folder=plan.chunk_path(0).parent, max_rows=max_rows,
        )  # fmt: skip
        self.summaries = [shards.write_shard({"chunk": c}, plan) for c in range(num_chunks)]
        chunks = packing.finished_chunks(plan, num_chunks)
        packing.join_tables(plan, chunks, Draft(output))
        self.quarantine = Quarantine()
        packing.list_bad_pictures(plan, chunks, self.quarantine)
        shutil.rmtree(plan.work)
        return output

    def cost(self) -> list[str | tuple[int, int]]:
        """Return of each chunk: that it is linked, or how many pictures were kept and fetched."""
        return [
            "linked" if summary["linked"] else (summary["kept"], summary["fetched"])
            for summary in self.summaries
        ]


@pytest.fixture
def shop(tmp_path: Path) -> Catalogue:
    return Catalogue(tmp_path)


def content(folder: Path) -> dict[str, bytes]:
    """Return everything but the tables that tell the state of the raw files."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    provenance = ("chunks.parquet", "pictures.parquet")
    return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name not in provenance}


def test_what_did_not_change_is_shared(shop: Catalogue) -> None:
    first, second = shop.make("a"), shop.make("b", "a")
    assert shop.cost() == ["linked"] * 3
    assert content(second) == content(first)
    for name in ("chunks.parquet", "pictures.parquet"):
        assert (second / name).read_bytes() == (first / name).read_bytes()
    for shard in (first / "shards").iterdir():
        assert (second / "shards" / shard.name).stat().st_ino == shard.stat().st_ino


def test_a_version_before_checksums_gives_its_pictures_and_shards(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its samples have none, so chunks are made again: of kept pictures, to the same shards."""
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.reuse._FORMAT_VERSION", 1)
        first = shop.make("a")
    whole = content(first)
    samples = pq.read_table(first / "samples.parquet")
    pq.write_table(samples.drop_columns(["crc32"]), first / "samples.parquet")
    second = shop.make("b", "a")
    assert [fetched for _, fetched in shop.cost()] == [0] * 3
    assert content(second) == whole
    for shard in (first / "shards").iterdir():
        assert (second / "shards" / shard.name).stat().st_ino == shard.stat().st_ino


def test_where_there_are_no_hard_links_shards_are_copied(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "another device")

    first = shop.make("a")
    monkeypatch.setattr(os, "link", refuse)
    second = shop.make("b", "a")
    assert shop.cost() == ["linked"] * 3
    assert content(second) == content(first)
    assert all(p.stat().st_nlink == 1 for p in (second / "shards").iterdir())


def new_picture(shop: Catalogue) -> None:
    Image.new("RGB", (30, 30)).save(shop.raw / "5.jpg")


def another_reference(shop: Catalogue) -> None:
    shop.rows["image"][5] = "6.jpg"


def another_text(shop: Catalogue) -> None:
    shop.rows["title"][5] = "Another title"


def no_picture(shop: Catalogue) -> None:
    shop.rows["image"][5] = None


def gone(shop: Catalogue) -> None:
    for column in shop.rows.values():
        del column[5]


def another_revision(shop: Catalogue) -> None:
    shop.revision = "2"


def touched(shop: Catalogue) -> None:
    os.utime(shop.raw / "5.jpg", times=(1, 1))


def appended(shop: Catalogue) -> None:
    for name, value in (("item_id", "k12"), ("title", "New"), ("image", "3.jpg")):
        shop.rows[name].insert(0, value)


@pytest.mark.parametrize(
    ("change", "cost"),
    [
        (new_picture, ["linked", (3, 1), "linked"]),
        (another_reference, ["linked", (3, 1), "linked"]),
        (another_text, ["linked", (4, 0), "linked"]),
        (no_picture, ["linked", (3, 0), "linked"]),
        (gone, ["linked", (3, 0), "linked"]),
        (touched, ["linked", (3, 1), "linked"]),
        (another_revision, [(0, 4)] * 3),
        (appended, ["linked", "linked", "linked", (0, 1)]),
    ],
)
def test_only_what_changed_is_fetched(shop: Catalogue, change: Any, cost: list[Any]) -> None:
    """And the result is what a version without a base would have written."""
    shop.make("a")
    change(shop)
    second = shop.make("b", "a")
    assert shop.cost() == cost
    if change is appended:
        for column in shop.rows.values():  # the order that a first version would number in
            column.append(column.pop(0))
    if change is not gone:
        assert content(second) == content(shop.make("fresh"))


def test_a_shard_that_comes_out_the_same_is_the_same_file(shop: Catalogue) -> None:
    first = shop.make("a")
    for item in range(NUM_ITEMS):
        os.utime(shop.raw / f"{item}.jpg", times=(1, 1))
    damaged = sorted((first / "shards").iterdir())[0]
    good = damaged.read_bytes()
    damaged.write_bytes(good[:-1] + b"!")
    second = shop.make("b", "a")
    assert shop.cost() == [(0, 4)] * 3
    assert (second / "shards" / damaged.name).read_bytes() == good
    same = [path.stat().st_nlink == 2 for path in sorted((second / "shards").iterdir())]
    assert same == [False, True, True]


def test_a_removed_item_keeps_its_number_and_comes_back_to_it(shop: Catalogue) -> None:
    first = shop.make("a")
    row = {name: column.pop(5) for name, column in shop.rows.items()}
    second = shop.make("b", "a")
    items = pq.read_table(second / "items.parquet").to_pylist()
    assert items[5] == {
        "item_index": 5, "item_key": "k5", "title": "", "text": "",
        "has_image": False, "has_text": False, "removed": True,
    }  # fmt: skip
    samples = pq.read_table(second / "samples.parquet")["item_index"].to_pylist()
    assert samples == [index for index in range(NUM_ITEMS) if index != 5]
    for name, column in shop.rows.items():
        column.append(row[name])
    third = shop.make("c", "b")
    assert shop.cost() == ["linked", (3, 1), "linked"]
    assert content(third) == content(first)


def test_a_chunk_of_removed_items_has_no_shard(shop: Catalogue) -> None:
    shop.make("a")
    for column in shop.rows.values():
        del column[4:8]
    second = shop.make("b", "a")
    assert len(list((second / "shards").iterdir())) == 2
    shop.make("c", "b")
    assert shop.cost() == ["linked"] * 3


def test_other_sizes_of_shards_keep_the_pictures(shop: Catalogue) -> None:
    shop.make("a")
    second = shop.make("b", "a", max_rows=5)
    assert shop.cost() == [(5, 0), (5, 0), (2, 0)]
    assert content(second) == content(shop.make("fresh", max_rows=5))


def test_a_damaged_shard_is_told_and_its_pictures_are_fetched_again(shop: Catalogue) -> None:
    first = shop.make("a")
    chunk = pq.read_table(first / "chunks.parquet").to_pylist()[1]
    path = first / chunk["shard"]
    good = path.read_bytes()
    path.write_bytes(good[:5000] + b"damage" + good[5006:])
    another_text(shop)
    second = shop.make("b", "a")
    assert shop.cost() == ["linked", (0, 4), "linked"]
    assert shop.summaries[1]["damaged"] == [chunk["shard"]]
    assert content(second) == content(shop.make("fresh"))


def test_a_cut_off_or_lost_shard_is_not_linked(shop: Catalogue) -> None:
    first = shop.make("a")
    known = pq.read_table(first / "chunks.parquet").to_pylist()
    os.truncate(first / known[0]["shard"], 512)
    (first / known[2]["shard"]).unlink()
    second = shop.make("b", "a")
    assert shop.cost() == [(0, 4), "linked", (0, 4)]
    assert [bool(summary["damaged"]) for summary in shop.summaries] == [True, False, True]
    fresh = content(shop.make("fresh"))
    assert content(second) == fresh


def test_a_lasting_verdict_is_kept_and_a_passing_one_is_not(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    (shop.raw / "1.jpg").write_bytes(b"no picture")
    (shop.raw / "2.jpg").unlink()
    shop.rows["image"][9] = "../out"
    read: list[str] = []
    answers = {"5.jpg": BadImage(Reason.IMAGE_TIMED_OUT, "slow", transient=True)}
    original = fetching.Fetcher.read

    def watched(self: fetching.Fetcher, reference: str) -> bytes:
        read.append(reference)
        if reference in answers:
            raise answers[reference]
        return original(self, reference)

    monkeypatch.setattr(fetching.Fetcher, "read", watched)
    shop.make("a")
    reasons = {
        "image_unknown_format": 1, "image_missing": 1, "image_forbidden_location": 1,
        "image_timed_out": 1,
    }  # fmt: skip
    assert shop.quarantine.reasons() == {"images": reasons}
    listed = shop.quarantine.table().to_pylist()
    read.clear()
    shop.make("b", "a")
    assert read == ["5.jpg"]
    assert shop.cost() == ["linked", (3, 1), "linked"]
    assert shop.quarantine.table().to_pylist() == listed
    read.clear()
    answers.clear()
    shutil.copy(shop.raw / "0.jpg", shop.raw / "2.jpg")
    shop.make("c", "b")
    assert read == ["2.jpg", "5.jpg"]
    assert shop.quarantine.reasons()["images"].keys() == {
        "image_unknown_format", "image_forbidden_location",
    }  # fmt: skip


@pytest.mark.parametrize(
    "reason", [Reason.IMAGE_HTTP_ERROR, Reason.IMAGE_UNREACHABLE, Reason.IMAGE_FORBIDDEN]
)
def test_what_a_web_host_answers_instead_of_a_picture_is_asked_again(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch, reason: Reason
) -> None:
    """And what came from there is fetched once; so is what came and is no picture."""
    read: list[str] = []
    data = (shop.raw / "0.jpg").read_bytes()
    bad = ["https://shop.example/5.jpg"]

    def answer(_: fetching.Fetcher, reference: str) -> bytes:
        read.append(reference)
        if reference in bad:
            raise BadImage(reason, "not now")
        return b"no picture" if "/2." in reference else data

    monkeypatch.setattr(fetching.Fetcher, "read", answer)
    shop.images = ImagesConfig(allowed_schemes=("https",), allowed_hosts=("shop.example",))
    shop.rows["image"] = [f"https://shop.example/{item}.jpg" for item in range(NUM_ITEMS)]
    shop.rows["image"][9] = "https://other.example/9.jpg"  # forbidden: nobody is asked
    shop.make("a")
    read.clear()
    shop.make("b", "a")
    assert read == bad
    assert shop.cost() == ["linked", (3, 1), "linked"]
    read.clear()
    bad.clear()
    shop.make("c", "b")
    assert read == ["https://shop.example/5.jpg"]
    shop.make("d", "c")
    assert shop.cost() == ["linked"] * 3


def test_a_file_that_is_there_and_cannot_be_found_is_looked_for_again(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fetching.Fetcher.read

    def away(self: fetching.Fetcher, reference: str) -> bytes:
        if reference == "5.jpg":
            raise BadImage(Reason.IMAGE_MISSING, "the storage went away")
        return original(self, reference)

    with monkeypatch.context() as patch:
        patch.setattr(fetching.Fetcher, "read", away)
        shop.make("a")
    shop.make("b", "a")
    assert shop.cost() == ["linked", (3, 1), "linked"]
    assert not shop.quarantine.reasons()


def test_another_address_of_the_root_means_other_pictures(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = (shop.raw / "0.jpg").read_bytes()
    monkeypatch.setattr(fetching.Fetcher, "read", lambda *_: data)
    shop.root = "https://shop.example/a"
    shop.make("a")
    shop.make("b", "a")
    assert shop.cost() == ["linked"] * 3
    shop.root = "https://shop.example/b"
    shop.make("c", "b")
    assert shop.cost() == [(0, 4)] * 3


def test_rows_of_a_stopped_attempt_do_not_outlive_a_linked_chunk(shop: Catalogue) -> None:
    first = shop.make("a")
    stray = shop.folder / "b.work" / "parts" / "000001.items.parquet"
    stray.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(first / "items.parquet").slice(8, 4), stray)
    second = shop.make("b", "a")
    assert shop.cost() == ["linked"] * 3
    assert content(second) == content(first)


def test_a_store_that_does_not_answer_is_asked_again(
    shop: Catalogue, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = fetching.source_state
    silent = {"5.jpg"}

    def state(reference: str, rules: ImageRules) -> str:
        return fetching.UNKNOWN if reference in silent else original(reference, rules)

    monkeypatch.setattr(pictures.fetching, "source_state", state)
    shop.make("a")
    shop.make("b", "a")
    assert shop.cost() == ["linked", (3, 1), "linked"]
    silent.clear()
    shop.make("c", "b")
    assert shop.cost() == ["linked", (3, 1), "linked"]
    shop.make("d", "c")
    assert shop.cost() == ["linked"] * 3


def test_pictures_in_the_table_are_compared_by_their_bytes(shop: Catalogue) -> None:
    data = [(shop.raw / f"{item}.jpg").read_bytes() for item in range(NUM_ITEMS)]
    shop.rows["image"] = list(data)
    first = shop.make("a")
    assert shop.cost() == [(0, 4)] * 3
    shop.make("b", "a")
    assert shop.cost() == ["linked"] * 3
    shop.rows["image"][5] = data[6]
    shop.make("c", "b")
    assert shop.cost() == ["linked", (3, 1), "linked"]
    shop.rows["image"] = [f"{item}.jpg" for item in range(NUM_ITEMS)]
    assert content(shop.make("fresh")) == content(first)


def test_the_digest_depends_on_values_and_not_on_how_a_table_was_cut() -> None:
    rows = pa.table({"i": [1, 2, 3], "s": ["a", None, "bcé"], "b": [True, False, True]})
    before = pa.table({"i": [0], "s": ["zzz"], "b": [True]})
    digest = reuse.chunk_digest(rows, ["", "x", ""], [1])
    pieces = pa.concat_tables([rows.slice(0, 1), rows.slice(1)])
    for same in (pa.concat_tables([before, rows]).slice(1), pieces, pieces.combine_chunks()):
        assert reuse.chunk_digest(same, ["", "x", ""], [1]) == digest
    others = [
        rows.set_column(1, "s", [["a", "", "bcé"]]),
        rows.set_column(1, "s", [["ab", None, "cé"]]),
        rows.set_column(0, "i", [[1, 2, 4]]),
        rows.set_column(2, "b", [[True, True, True]]),
        rows.slice(0, 2),
    ]
    digests = {reuse.chunk_digest(other, ["", "x", ""], [1]) for other in others}
    digests |= {reuse.chunk_digest(rows, ["", "", "x"], [1])}
    digests |= {reuse.chunk_digest(rows, ["", "x", ""], [2])}
    assert len(digests | {digest}) == 8
