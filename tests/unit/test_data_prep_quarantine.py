"""The quarantine in files: same rows, same order, counted without reading."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from data_prep import quarantine
from data_prep.quarantine import Quarantine, Reason, make_table


def test_parts_are_joined_in_the_order_in_which_they_were_added(tmp_path: Path) -> None:
    part = make_table("images", ["b", "c"], [Reason.IMAGE_EMPTY] * 2, ["", ""])
    pq.write_table(part, tmp_path / "part.parquet")
    listed = Quarantine()
    listed.add("items", [("a", Reason.MISSING_KEY, "row 1")])
    listed.add_file(tmp_path / "part.parquet")
    listed.add("interactions", [("d", Reason.BAD_RATING, "row 2")])
    listed.write(tmp_path / "all.parquet")
    written = pq.read_table(tmp_path / "all.parquet")
    assert written["key"].to_pylist() == ["a", "b", "c", "d"]
    assert written.equals(listed.table())
    assert listed.reasons() == {
        "images": {"image_empty": 2},
        "interactions": {"bad_rating": 1},
        "items": {"missing_key": 1},
    }


def test_counts_that_a_task_made_are_believed(tmp_path: Path) -> None:
    listed = Quarantine()
    listed.add_file(tmp_path / "never read.parquet", {"items": {"missing_key": 7}})
    listed.add_file(tmp_path / "nothing in it.parquet", {})
    assert listed.reasons() == {"items": {"missing_key": 7}}


def test_many_rows_leave_memory_and_the_file_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "_ROWS_IN_MEMORY", 10)
    monkeypatch.setattr(quarantine, "_GROUP_ROWS", 8)
    in_memory, on_disk = Quarantine(), Quarantine(tmp_path / "parts")
    for number in range(15):
        rows = [(f"{number}-{row}", Reason.MISSING_KEY, "") for row in range(number % 4)]
        in_memory.add("items", rows)
        on_disk.add("items", rows)
    assert list((tmp_path / "parts").iterdir())
    in_memory.write(tmp_path / "memory.parquet")
    on_disk.write(tmp_path / "disk.parquet")
    assert (tmp_path / "memory.parquet").read_bytes() == (tmp_path / "disk.parquet").read_bytes()
    assert in_memory.reasons() == on_disk.reasons() == {"items": {"missing_key": 21}}
    assert pq.ParquetFile(tmp_path / "disk.parquet").num_row_groups == 3


def test_what_a_killed_run_listed_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "000000.parquet").write_bytes(b"torn")
    Quarantine(tmp_path / "parts").write(tmp_path / "all.parquet")
    assert len(pq.read_table(tmp_path / "all.parquet")) == 0
    assert not (tmp_path / "parts").exists()
