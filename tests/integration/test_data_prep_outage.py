"""What goes wrong around a run: storage that is away or full, tables cut off or replaced."""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import yaml

from alignrec import artifacts, stage
from alignrec.testing import synthetic
from data_prep import STAGE, engine, interactions, packing, shards
from data_prep.shards import ShardPlan

pytestmark = pytest.mark.integration
NUM_ITEMS = 30


class Shop:
    """A raw catalogue, and the datasets made of it."""

    def __init__(self, folder: Path) -> None:
        self.raw = folder / "raw"
        self.output = folder / "run" / "data_prep"
        self.output.parent.mkdir()
        self.versions = {"root": str(folder / "versions")}
        synthetic.write_catalogue(self.raw, num_items=NUM_ITEMS, num_users=20, image_size=48)

    def prepare(self, **changes: Any) -> int:
        section: dict[str, Any] = {
            "items": {"path": str(self.raw / "items.parquet")},
            "interactions": {"path": str(self.raw / "interactions.parquet")},
            "shards": {"max_samples": 8},
            "num_cpus": 1,
        }
        recipe = self.output.with_name("recipe.yaml")
        recipe.write_text(yaml.safe_dump({"data_prep": {**section, **changes}}))
        return stage.main(STAGE, ["--output", str(self.output), "--recipe", str(recipe)])

    def cut_off(self, num_items: int) -> None:
        """Leave the first items in the table, and their rows in the log."""
        items = pq.read_table(self.raw / "items.parquet").slice(0, num_items)
        log = pq.read_table(self.raw / "interactions.parquet")
        pq.write_table(items, self.raw / "items.parquet")
        known = log.filter(pc.is_in(log["item_id"], items["item_id"]))
        pq.write_table(known, self.raw / "interactions.parquet")


@pytest.fixture
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shop:
    def make_here(
        plan: ShardPlan, chunks: list[int], *, num_cpus: int, finished: Callable[[Any], None]
    ) -> None:
        for chunk in chunks:
            finished(shards.write_shard({"chunk": chunk}, plan))

    monkeypatch.setattr(engine, "session", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(engine, "run_shards", make_here)
    return Shop(tmp_path)


@pytest.mark.parametrize("has_versions", [False, True])
def test_after_an_outage_the_same_command_succeeds(
    shop: Shop, capsys: pytest.CaptureFixture[str], *, has_versions: bool
) -> None:
    changes = {"versions": shop.versions} if has_versions else {}
    undisturbed = shop.output.with_name("undisturbed")
    assert shop.prepare() == 0
    shop.output.rename(undisturbed)
    shop.raw.joinpath("images").rename(shop.raw / "away")
    assert shop.prepare(**changes) == 1
    assert "image_missing" in capsys.readouterr().err
    shop.raw.joinpath("away").rename(shop.raw / "images")
    assert shop.prepare(**changes) == 0
    made = artifacts.verify(shop.output)
    assert made.identity == artifacts.read(undisturbed).identity


@pytest.mark.parametrize("table", ["items", "interactions"])
def test_a_table_that_is_replaced_while_it_is_read_is_not_published(
    shop: Shop,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    table: str,
) -> None:
    original = interactions.write

    def replace(*words: Any, **named: Any) -> Any:
        os.utime(shop.raw / f"{table}.parquet", times=(1, 1))
        return original(*words, **named)

    monkeypatch.setattr(interactions, "write", replace)
    assert shop.prepare() == 1
    assert "changed while it was read" in capsys.readouterr().err
    assert not shop.output.exists()
    monkeypatch.undo()


def test_a_catalogue_that_was_cut_off_is_not_published(
    shop: Shop, capsys: pytest.CaptureFixture[str]
) -> None:
    assert shop.prepare(versions=shop.versions) == 0
    shop.cut_off(27)
    assert shop.prepare(versions=shop.versions) == 0
    shop.cut_off(14)
    assert shop.prepare(versions=shop.versions) == 1
    said = capsys.readouterr().err
    assert "13 of the 27 items of version 000002 are gone" in said
    assert "versions.max_removed_fraction=0.1" in said
    assert shop.output.resolve().name == "000002"
    assert shop.prepare(versions={**shop.versions, "max_removed_fraction": 0.5}) == 0
    assert shop.output.resolve().name == "000003"
    assert artifacts.read(shop.output).counts["num_removed"] == 16
    assert shop.prepare(versions=shop.versions) == 0  # those are gone already


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_storage_that_takes_no_more_is_named(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: int
) -> None:
    def fail(*_: object) -> None:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(packing, "join_tables", fail)
    assert shop.prepare() == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"failed: {shop.output} cannot be written ({os.strerror(fault)}), so the stage stopped. "
        f"Make room, and run the same command again: it resumes."
    )
