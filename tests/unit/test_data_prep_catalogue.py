"""Catalogue: numbers that stay from version to version, rows in the order of their numbers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.errors import StageFailure
from data_prep import catalogue, locations, readers, sorting
from data_prep.catalogue import Numbering
from data_prep.config import ItemColumns
from data_prep.quarantine import Quarantine

COLUMNS = ItemColumns(text=("brand",), image=None)


def numbering(keys: str, earlier: str = "") -> Numbering:
    return Numbering.of(pa.array(list(keys)), pa.array(list(earlier), pa.string()))


def kept(keys: str, chosen: str) -> npt.NDArray[np.bool_]:
    return np.array([key in chosen for key in keys])


def test_the_first_version_numbers_kept_items_in_the_order_of_the_table() -> None:
    first = Numbering.of(pa.array(list("abcd")))
    assert first.assign(kept("abcd", "abcd")).tolist() == [0, 1, 2, 3]
    numbers = first.assign(kept("abcd", "bd"))
    assert numbers.tolist() == [-1, 0, -1, 1]
    assert len(first.removed(numbers)) == 0


def test_known_items_keep_their_numbers_and_new_ones_follow() -> None:
    second = numbering("xcay", earlier="abc")
    numbers = second.assign(kept("xcay", "xcay"))
    assert numbers.tolist() == [3, 2, 0, 4]
    assert second.removed(numbers).to_pylist() == [{"item_index": 1, "item_key": "b"}]


def test_a_known_item_that_is_not_kept_is_removed() -> None:
    second = numbering("abx", earlier="abc")
    numbers = second.assign(kept("abx", "bx"))
    assert numbers.tolist() == [-1, 1, 3]
    assert second.removed(numbers)["item_key"].to_pylist() == ["a", "c"]


def test_keys_may_have_more_than_2_gib_together(tmp_path: Path) -> None:
    for kind in (pa.string(), pa.large_string()):
        table = {"item_id": pa.array(["a", "b", "a"], kind), "brand": ["x"] * 3, "title": ["t"] * 3}
        pq.write_table(pa.table(table), tmp_path / "items.parquet")
        files = locations.find([str(tmp_path / "items.parquet")])
        keys = catalogue.read_keys(files, COLUMNS, Quarantine())
        assert keys.good.type == pa.large_string()
        for earlier in (pa.array(["b", "c"]), pa.array(["b", "c"], pa.large_string())):
            found = Numbering.of(keys.good, earlier)
            numbers = found.assign(np.array([True, True]))
            assert numbers.tolist() == [2, 0]
            assert found.removed(numbers)["item_key"].to_pylist() == ["c"]


def test_rows_that_cannot_be_parsed_are_listed_and_not_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_MAX_MALFORMED", 7)
    lines = [f"k{row},t,b" if row % 3 else "torn" for row in range(100)]
    (tmp_path / "items.csv").write_text("item_id,title,brand\n" + "\n".join(lines))
    listed, held = Quarantine(), []
    add = listed.add
    monkeypatch.setattr(listed, "add", lambda source, rows: add(source, _noted(rows, held)))
    keys = catalogue.read_keys(locations.find([str(tmp_path / "items.csv")]), COLUMNS, listed)
    assert (len(keys.good), keys.num_rows, keys.num_malformed) == (66, 66, 34)
    assert listed.reasons() == {"items": {"malformed_row": 34}}
    numbers = [int(key.rpartition(" ")[2]) for key in listed.table()["key"].to_pylist()]
    assert numbers == list(range(1, 101, 3))
    assert max(held) == 7


def _noted(rows: Iterable[Any], sizes: list[int]) -> list[Any]:
    given = list(rows)
    sizes.append(len(given))
    return given


def test_numbers_never_change_over_any_history() -> None:
    """Keys come, go and come back at random: a key has one number for ever, without gaps."""
    rng = np.random.default_rng(0)
    earlier: list[str] = []
    number_of: dict[str, int] = {}
    for _ in range(30):
        present = [str(key) for key in rng.permutation(40)[: rng.integers(1, 40)]]
        found = Numbering.of(pa.array(present), pa.array(earlier, pa.string()))
        chosen = rng.random(len(present)) < 0.8
        numbers = found.assign(chosen)
        for key, number, is_kept in zip(present, numbers.tolist(), chosen, strict=True):
            assert (number >= 0) == is_kept
            if is_kept:
                assert number_of.setdefault(key, number) == number
        removed = found.removed(numbers)["item_index"].to_pylist()
        everybody = sorted([*removed, *numbers[numbers >= 0].tolist()])
        assert everybody == list(range(len(number_of)))
        earlier = sorted(number_of, key=lambda key: number_of[key])


def read_keys(files: list[locations.RawFile]) -> catalogue.Keys:
    return catalogue.read_keys(files, COLUMNS, Quarantine())


def write_table(folder: Path, keys: list[str]) -> list[locations.RawFile]:
    rows = {"item_id": keys, "title": [f"title {k}" for k in keys], "brand": keys}
    pq.write_table(pa.table(rows), folder / "items.parquet", row_group_size=7)
    return locations.find([str(folder / "items.parquet")])


def read_chunks(folder: Path, num_chunks: int) -> list[list[dict[str, Any]]]:
    return [pq.read_table(folder / f"{c:06d}.parquet").to_pylist() for c in range(num_chunks)]


@pytest.mark.parametrize("bucket_bytes", [1, 500, 1 << 30])
@pytest.mark.parametrize("max_rows", [1, 4, 50])
def test_chunks_are_ranges_of_numbers_whatever_the_order_of_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bucket_bytes: int, max_rows: int
) -> None:
    monkeypatch.setattr(sorting, "_BUCKET_BYTES", bucket_bytes)
    monkeypatch.setattr(catalogue, "_REMOVED_ROWS", 2)
    rng = np.random.default_rng(1)
    numbers = rng.permutation(45)
    gone = np.sort(numbers[:6])
    keys = [f"k{number}" for number in numbers[6:]]
    files = write_table(tmp_path, [*keys, "not kept"])
    removed = pa.table({"item_index": gone, "item_key": [f"k{number}" for number in gone]})
    num_chunks = catalogue.write_chunks(
        files, COLUMNS, keys=read_keys(files), numbers=np.append(numbers[6:], -1),
        removed=removed, folder=tmp_path / "chunks", max_rows=max_rows,
    )  # fmt: skip
    chunks = read_chunks(tmp_path / "chunks", num_chunks)
    assert [len(chunk) for chunk in chunks[:-1]] == [max_rows] * (num_chunks - 1)
    rows = [row for chunk in chunks for row in chunk]
    assert [row["item_index"] for row in rows] == list(range(45))
    for row in rows:
        is_gone = row["item_index"] in gone
        assert row["item_key"] == f"k{row['item_index']}"
        assert row["removed"] == is_gone
        assert row["text:brand"] == (None if is_gone else row["item_key"])
    assert not (tmp_path / "chunks" / "sorting").exists()


def test_a_table_in_the_order_of_its_numbers_gives_the_same_chunks_without_sorting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_table(tmp_path, [f"k{number}" for number in range(20)])
    nothing = pa.table({"item_index": pa.array([], pa.int64()), "item_key": pa.array([], "string")})

    def chunks(name: str) -> list[list[dict[str, Any]]]:
        num_chunks = catalogue.write_chunks(
            files, COLUMNS, keys=read_keys(files), numbers=np.arange(20), removed=nothing,
            folder=tmp_path / name, max_rows=6,
        )  # fmt: skip
        return read_chunks(tmp_path / name, num_chunks)

    straight = chunks("straight")
    monkeypatch.setattr(np, "diff", lambda _: np.array([-1]))  # pretend that it is not
    assert chunks("sorted") == straight


def test_what_a_kill_left_of_the_chunks_is_made_again(tmp_path: Path) -> None:
    files = write_table(tmp_path, ["a", "b"])
    gone = pa.table({"item_index": [2], "item_key": ["c"]})
    folder = tmp_path / "chunks"
    (folder / "sorting").mkdir(parents=True)
    (folder / "000007.parquet").write_bytes(b"torn")
    num_chunks = catalogue.write_chunks(
        files, COLUMNS, keys=read_keys(files), numbers=np.array([1, 0]), removed=gone,
        folder=folder, max_rows=2,
    )  # fmt: skip
    assert num_chunks == 2
    assert sorted(p.name for p in folder.iterdir()) == [
        "000000.parquet", "000001.parquet", "done.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "later", [["b", "a", "c"], ["a", "b"], ["a", "b", "c", "d"], ["a", "b", "b"]]
)
def test_a_table_that_is_replaced_between_the_passes_is_noticed(
    tmp_path: Path, later: list[str]
) -> None:
    files = write_table(tmp_path, ["a", "b", "c"])
    keys = read_keys(files)
    files = write_table(tmp_path, later)
    nothing = pa.table({"item_index": pa.array([], pa.int64()), "item_key": pa.array([], "string")})
    with pytest.raises(StageFailure, match=r"items\.parquet: the item table changed while it was"):
        catalogue.write_chunks(
            files, COLUMNS, keys=keys, numbers=np.arange(3), removed=nothing,
            folder=tmp_path / "chunks", max_rows=2,
        )  # fmt: skip
    assert not (tmp_path / "chunks" / "done.json").exists()
