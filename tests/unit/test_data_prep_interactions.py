"""The log from its files to the artifact's against a plain implementation, and what it ignores."""

import dataclasses
import math
import mmap
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.data import schema
from alignrec.data.schema import SPLITS
from alignrec.errors import StageFailure, UserError
from alignrec.telemetry import Telemetry
from data_prep import (
    buckets,
    hashing,
    interaction_files,
    interactions,
    locations,
    log,
    readers,
    units,
)
from data_prep.buckets import Rows
from data_prep.config import (
    DataPrepConfig,
    InteractionColumns,
    InteractionsConfig,
    ItemsConfig,
    SplitConfig,
)
from data_prep.interaction_files import InteractionFiles, LabelledRows
from data_prep.interactions import Cleaned, Written
from data_prep.quarantine import Quarantine

NUM_ITEMS = 14
ITEMS = pa.array([f"item-{number}" for number in range(NUM_ITEMS)])
COLUMNS = InteractionColumns(rating="r", timestamp="t")
FILES = ("users.parquet", *(f"interactions/{split}.parquet" for split in SPLITS))
Row = tuple[str, str, float, int]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Divide small logs like large ones: pieces of a row group, runs of a batch, short ranges."""
    monkeypatch.setattr(interactions, "_PIECE_BYTES", 1)
    monkeypatch.setattr(log, "RUN_ROWS", 40)
    monkeypatch.setattr(interaction_files, "RANGE_ROWS", 50)


@pytest.fixture
def telemetry(tmp_path: Path) -> Iterator[Telemetry]:
    with Telemetry(tmp_path / "logs", "data_prep") as result:
        yield result


def random_log(seed: int, *, num_rows: int = 400, num_users: int = 30) -> list[Row]:
    rng = np.random.default_rng(seed)
    users = np.minimum(rng.geometric(0.08, num_rows), num_users)
    items = np.minimum(rng.geometric(0.2, num_rows), NUM_ITEMS) - 1
    return [
        (f"user-{user}", f"item-{item}", float(rating), int(time))
        for user, item, rating, time in zip(
            users, items, rng.integers(1, 6, num_rows), rng.integers(0, 40, num_rows), strict=True
        )
    ]


def write_log(path: Path, rows: list[Row], *, group_rows: int = 60) -> str:
    users, items, ratings, times = (list(column) for column in zip(*rows, strict=True))
    table = {"user_id": users, "item_id": items, "r": ratings, "t": times}
    pq.write_table(pa.table(table), path, row_group_size=group_rows)
    return str(path)


def settings(path: str | tuple[str, ...], **changes: Any) -> DataPrepConfig:
    split = SplitConfig(**changes.pop("split", {}))
    return DataPrepConfig(
        items=ItemsConfig(path="items.parquet"),
        interactions=InteractionsConfig(**{"path": path, "columns": COLUMNS, **changes}),
        split=split,
        num_cpus=1,  # no Ray
    )


@dataclasses.dataclass
class Result:
    cleaned: Cleaned
    written: Written
    quarantine: Quarantine
    folder: Path

    @property
    def bytes(self) -> list[bytes]:
        return [(self.folder / name).read_bytes() for name in FILES]

    def users(self) -> list[str]:
        return schema.read_users(self.folder)["user_key"].to_pylist()

    def rows(self) -> dict[tuple[str, str], tuple[str, float, int]]:
        """Return (user key, item key) -> (split, rating, time)."""
        users = self.users()
        kept = ITEMS.filter(pa.array(self.cleaned.interacted)).to_pylist()
        found = {}
        for split in SPLITS:
            table = pq.read_table(schema.interactions_path(self.folder, split))
            assert table.schema.equals(schema.INTERACTIONS)
            for row in table.to_pylist():
                key = users[row["user_index"]], kept[row["item_index"]]
                assert key not in found
                found[key] = (split, row["rating"], row["timestamp"])
        return found


def prepare(
    config: DataPrepConfig,
    folder: Path,
    telemetry: Telemetry,
    *,
    base: list[str] | None = None,
    buckets: int | None = None,
) -> Result:
    files = locations.find([config.interactions.path] if isinstance(
        config.interactions.path, str) else config.interactions.path)  # fmt: skip
    if buckets is not None:
        rows_per_task = max(math.ceil(log.estimate_rows(files) / buckets), 1)
        changed = dataclasses.replace(config.interactions, rows_per_task=rows_per_task)
        config = dataclasses.replace(config, interactions=changed)
    folder.mkdir(exist_ok=True)
    quarantine = Quarantine()
    cleaned = interactions.clean(
        files, config, ITEMS, quarantine=quarantine, work=folder / "work", telemetry=telemetry
    )
    kept = cleaned.interacted
    written = interactions.write(
        cleaned,
        item_index=np.where(kept, np.cumsum(kept) - 1, -1),
        base_user_keys=None if base is None else pa.array(base, pa.large_string()),
        folder=folder,
    )
    return Result(cleaned, written, quarantine, folder)


def plain_clean(rows: list[Row], config: InteractionsConfig) -> dict[tuple[str, str], Row]:
    """Clean a log of usable rows with dictionaries and loops."""
    best: dict[tuple[str, str], tuple[tuple[int, int], Row]] = {}
    for number, row in enumerate(rows):
        if config.min_rating is not None and row[2] < config.min_rating:
            continue
        place = (row[3], number)
        old = best.get(row[:2])
        if old is None or (place > old[0] if config.duplicates == "last" else place < old[0]):
            best[row[:2]] = (place, row)
    left = {pair: row for pair, (_, row) in best.items()}
    while True:
        users, items = (Counter(pair[side] for pair in left) for side in (0, 1))
        core = {
            pair: row
            for pair, row in left.items()
            if users[pair[0]] >= config.min_user_interactions
            and items[pair[1]] >= config.min_item_interactions
        }
        if len(core) == len(left):
            return core
        left = core


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"duplicates": "first", "min_rating": 2.0},
        {"min_user_interactions": 5, "min_item_interactions": 9},
        {"min_user_interactions": 5, "min_item_interactions": 8, "min_rating": 2.0},
    ],
)
def test_what_is_left_equals_a_plain_implementation(
    tmp_path: Path, telemetry: Telemetry, seed: int, changes: dict[str, Any]
) -> None:
    rows = random_log(seed)
    config = settings(write_log(tmp_path / "log.parquet", rows), **changes)
    result = prepare(config, tmp_path / "out", telemetry, buckets=5)
    expected = plain_clean(rows, config.interactions)
    found = result.rows()
    assert {pair: values[1:] for pair, values in found.items()} == {
        pair: row[2:] for pair, row in expected.items()
    }
    facts = result.written.facts
    assert facts["left"] == len(expected)
    dropped = facts["below_min_rating"] + facts["repeated"] + facts["outside_of_core"]
    assert facts["usable"] - dropped == facts["left"]
    first_rows = list(dict.fromkeys(row[0] for row in rows))
    assert result.users() == [u for u in first_rows if u in {pair[0] for pair in expected}]


def test_a_core_that_unravels_step_by_step(tmp_path: Path, telemetry: Telemetry) -> None:
    # A chain of users and items, of which each loses its hold when the one before goes, and a ring.
    chain = [(f"user-{k}", f"item-{k + side}", 1.0, 1) for k in range(10) for side in (0, 1)]
    ring = [
        (f"ring-{k}", f"item-{11 + (k + side) % 3}", 1.0, 1) for k in range(3) for side in (0, 1)
    ]
    config = settings(
        write_log(tmp_path / "log.parquet", chain + ring),
        min_user_interactions=2,
        min_item_interactions=2,
    )
    result = prepare(config, tmp_path / "out", telemetry, buckets=4)
    assert result.rows().keys() == {row[:2] for row in ring}
    assert result.written.facts["core_rounds"] == 5  # the chain goes from both ends


@pytest.mark.parametrize("strategy", ["user_random", "user_time", "user_last_out", "global_time"])
def test_the_bytes_do_not_depend_on_the_buckets(
    tmp_path: Path, telemetry: Telemetry, strategy: str
) -> None:
    config = settings(
        write_log(tmp_path / "log.parquet", random_log(1)),
        min_user_interactions=3,
        min_item_interactions=9,
        split={"strategy": strategy},
    )
    results = [
        prepare(config, tmp_path / f"{number}", telemetry, buckets=number) for number in (1, 3, 7)
    ]
    assert [result.cleaned.plan.buckets.log.num_buckets for result in results] == [1, 3, 7]
    assert results[0].bytes == results[1].bytes == results[2].bytes
    assert results[0].written == results[1].written == results[2].written
    assert {label for label, _, _ in results[0].rows().values()} == set(SPLITS)


def test_the_bytes_do_not_depend_on_pieces_and_runs(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [*random_log(2), ("user-1", "no such item", 1.0, 1)] * 2
    pieces = prepare(
        settings(write_log(tmp_path / "pieces.parquet", rows)), tmp_path / "a", telemetry
    )
    monkeypatch.setattr(log, "RUN_ROWS", 10**6)
    whole = prepare(
        settings(write_log(tmp_path / "whole.parquet", rows, group_rows=10**6)),
        tmp_path / "b",
        telemetry,
    )
    assert pieces.bytes == whole.bytes
    assert pieces.quarantine.table().equals(whole.quarantine.table())
    assert pieces.quarantine.table()["detail"].to_pylist() == ["row 401", "row 802"]


def test_a_shuffled_log_is_split_the_same_way(tmp_path: Path, telemetry: Telemetry) -> None:
    rows = list({row[:2]: row for row in random_log(3)}.values())
    order = np.random.default_rng(0).permutation(len(rows))
    splits_by_pair = []
    for name, log_rows in (("a", rows), ("b", [rows[index] for index in order])):
        config = settings(write_log(tmp_path / f"{name}.parquet", log_rows))
        splits_by_pair.append(prepare(config, tmp_path / name, telemetry, buckets=2).rows())
    assert splits_by_pair[0] == splits_by_pair[1]


def test_users_of_equal_hash_stay_two_users(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_log(4)
    config = settings(write_log(tmp_path / "log.parquet", rows))
    apart = prepare(config, tmp_path / "apart", telemetry, buckets=3)
    for module in (log, interactions):
        monkeypatch.setattr(module, "hash_keys", lambda keys: np.full(len(keys), 7, np.uint64))
    together = prepare(config, tmp_path / "together", telemetry, buckets=3)
    assert together.users() == apart.users()
    assert together.rows().keys() == apart.rows().keys()


def test_global_time_cuts_where_sorting_would(tmp_path: Path, telemetry: Telemetry) -> None:
    rng = np.random.default_rng(5)
    times = rng.integers(-(2**62), 2**62, 400)
    times[::3] = rng.integers(-3, 3, len(times[::3]))
    rows = [(u, i, r, int(t)) for (u, i, r, _), t in zip(random_log(5), times, strict=True)]
    config = settings(
        write_log(tmp_path / "log.parquet", rows),
        split={"strategy": "global_time", "held_out": 0.5},
    )
    result = prepare(config, tmp_path / "out", telemetry, buckets=4)
    ordered = sorted(time for _, _, time in result.rows().values())
    both = len(ordered) // 2
    valid_after, test_after = ordered[-both - 1], ordered[-(both - both // 2) - 1]
    for label, _, time in result.rows().values():
        assert label == ("train", "valid", "test")[(time > valid_after) + (time > test_after)]


def test_unusable_rows_are_listed_with_their_reason(tmp_path: Path, telemetry: Telemetry) -> None:
    users = ["u1", None, "u2", "", "u3", "u\x01", "u4", "u5", "u1", "u6", "u7"]
    items = ["item-0", "item-0", None, "item-1", "z", "item-0", "item-1", "item-2", "item-1",
             "item-1", "item-3"]  # fmt: skip
    table = {
        "user_id": users, "item_id": items,
        "r": ["5", "4", "3", "2", "1", "1", "five", "2", "", "3", "2"],
        "t": ["1", "2", "3", "4", "5", "6", "7", "soon", "2020-02-01", "2023-02-31", ""],
    }  # fmt: skip
    pq.write_table(pa.table(table), tmp_path / "log.parquet", row_group_size=4)
    result = prepare(settings(str(tmp_path / "log.parquet")), tmp_path / "out", telemetry)
    assert result.rows() == {
        ("u1", "item-0"): ("train", 5.0, 1),
        ("u1", "item-1"): ("train", None, 1580515200),
        ("u7", "item-3"): ("train", 2.0, None),
    }
    assert result.quarantine.reasons() == {
        "interactions": {
            "missing_user": 2, "missing_item": 1, "unknown_item": 1, "invalid_key": 1,
            "bad_rating": 1, "bad_timestamp": 2,
        }
    }  # fmt: skip
    listed = [(row["key"], row["detail"]) for row in result.quarantine.table().to_pylist()]
    assert listed[:4] == [
        (" -> item-0", "row 2"), ("u2 -> ", "row 3"), (" -> item-1", "row 4"), ("u3 -> z", "row 5"),
    ]  # fmt: skip
    assert result.written.facts["rows"] == 11


def test_a_split_by_time_needs_times(tmp_path: Path, telemetry: Telemetry) -> None:
    table = pa.table({"user_id": ["u", "u"], "item_id": ITEMS[:2], "t": [7, None], "r": [1, 1]})
    pq.write_table(table, tmp_path / "log.parquet")
    path = str(tmp_path / "log.parquet")
    random = prepare(settings(path), tmp_path / "a", telemetry)
    assert len(random.rows()) == 2
    by_time = prepare(settings(path, split={"strategy": "user_time"}), tmp_path / "b", telemetry)
    assert len(by_time.rows()) == 1
    assert by_time.quarantine.reasons() == {"interactions": {"bad_timestamp": 1}}


def test_rows_of_unknown_items_can_be_left_out(tmp_path: Path, telemetry: Telemetry) -> None:
    rows = random_log(6)
    clean = prepare(settings(write_log(tmp_path / "a.parquet", rows)), tmp_path / "a", telemetry)
    with_unknown = [*rows[:100], *([("user-9", "z", 1.0, 3)] * 70), *rows[100:]]
    path = write_log(tmp_path / "b.parquet", with_unknown)
    result = prepare(settings(path, unknown_items="drop"), tmp_path / "b", telemetry)
    assert result.bytes == clean.bytes
    assert result.quarantine.reasons() == {}
    assert result.written.facts["unknown_items_dropped"] == 70
    assert result.written.facts["rows"] == 470


def test_rows_of_several_files_say_their_file(tmp_path: Path, telemetry: Telemetry) -> None:
    (tmp_path / "a.csv").write_text("user_id,item_id,r,t\nu,item-1,1,2\nu,z,1,2\nu,item-1\n")
    (tmp_path / "b.csv").write_text("user_id,item_id,r,t\nu,y,1,2\nu,item-2,1,2\n")
    paths = (str(tmp_path / "a.csv"), str(tmp_path / "b.csv"))
    result = prepare(settings(paths), tmp_path / "out", telemetry)
    listed = [(row["reason"], row["detail"]) for row in result.quarantine.table().to_pylist()]
    assert sorted(listed) == [
        ("malformed_row", "2 columns instead of 4"),
        ("unknown_item", "row 1 of b.csv"),
        ("unknown_item", "row 2 of a.csv"),
    ]
    assert result.rows().keys() == {("u", "item-1"), ("u", "item-2")}
    assert result.written.facts["rows"] == 5


def test_keys_of_more_than_2_gib_change_nothing(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"user-{n % 5},item-{n % 4},{n % 3},{n}\n" for n in range(40)]
    (tmp_path / "a.csv").write_text("user_id,item_id,r,t\n" + "".join(lines))
    config = settings(str(tmp_path / "a.csv"))
    plain = prepare(config, tmp_path / "plain", telemetry, base=["user-3"], buckets=3)
    monkeypatch.setattr(sys.modules[__name__], "ITEMS", ITEMS.cast(pa.large_string()))
    large = prepare(config, tmp_path / "large", telemetry, base=["user-3"], buckets=3)
    assert plain.rows()
    assert large.rows() == plain.rows()
    for name in ("users.parquet", "interactions/train.parquet"):
        assert (large.folder / name).read_bytes() == (plain.folder / name).read_bytes()


def test_a_file_of_malformed_rows_is_listed_piece_by_piece(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "_MAX_MALFORMED", 3)
    lines = [f"torn {number}\n" for number in range(10)]
    (tmp_path / "a.csv").write_text("user_id,item_id,r,t\n" + "".join(lines) + "u,item-1,1,2\n")
    result = prepare(settings(str(tmp_path / "a.csv")), tmp_path / "out", telemetry)
    listed = result.quarantine.table()["key"].to_pylist()
    assert [key.rpartition(" ")[2] for key in listed] == [str(row) for row in range(1, 11)]
    assert result.written.facts["rows"] == 11


def test_a_key_of_any_length_costs_no_hashing(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    plain = log.hash_keys

    def noting(keys: pa.Array) -> hashing.Hashes:
        lengths.extend(len(key) for key in keys.to_pylist())
        return plain(keys)

    monkeypatch.setattr(log, "hash_keys", noting)
    rows = [("x" * 100_000, "item-1", 1.0, 1), (" " * 100_000, "item-1", 1.0, 1),
            ("y" * 256, "item-1", 1.0, 1)]  # fmt: skip
    config = settings(write_log(tmp_path / "log.parquet", rows))
    result = prepare(config, tmp_path / "out", telemetry)
    assert result.users() == ["y" * 256]
    assert result.quarantine.reasons() == {"interactions": {"invalid_key": 1, "missing_user": 1}}
    assert max(lengths) == 256


def test_users_of_the_version_before_keep_their_numbers(
    tmp_path: Path, telemetry: Telemetry
) -> None:
    rows = random_log(7)
    path = write_log(tmp_path / "log.parquet", rows)
    first = prepare(settings(path), tmp_path / "first", telemetry, buckets=3)
    base = ["gone", *reversed(first.users()[3:]), "gone too"]
    for number in (1, 4):
        result = prepare(
            settings(path), tmp_path / f"{number}", telemetry, base=base, buckets=number
        )
        assert result.users() == base + first.users()[:3]
        assert result.rows() == first.rows()
        assert result.written.counts["num_users"] == len(first.users()) + 2
    names = [(tmp_path / "1" / name).read_bytes() for name in FILES]
    assert names == [(tmp_path / "4" / name).read_bytes() for name in FILES]


def test_a_stopped_run_goes_on_where_it_was(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(
        write_log(tmp_path / "log.parquet", random_log(8)),
        min_user_interactions=5,
        min_item_interactions=12,
    )
    whole = prepare(config, tmp_path / "whole", telemetry, buckets=3)
    made: list[str] = []
    save = units.save
    stop_at = 0

    def failing_save(path: Path, **arrays: Any) -> None:
        made.append(path.parent.name + path.name)
        if len(made) == stop_at:
            raise KeyboardInterrupt
        save(path, **arrays)

    monkeypatch.setattr(units, "save", failing_save)
    stops = 0
    while True:
        made.clear()
        stop_at = stops % 3 + 1  # a few steps further each time
        try:
            stopped = prepare(config, tmp_path / "stopped", telemetry, buckets=3)
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops >= 3
    assert stopped.bytes == whole.bytes
    assert not list((tmp_path / "stopped").rglob(".*"))


def test_nothing_left_is_the_users_mistake(tmp_path: Path, telemetry: Telemetry) -> None:
    config = settings(
        write_log(tmp_path / "log.parquet", random_log(9)), min_user_interactions=1000
    )
    with pytest.raises(UserError, match="no interaction is left of 400 usable"):
        prepare(config, tmp_path / "out", telemetry)


def test_too_many_bad_rows_stop_before_the_log_is_cleaned(
    tmp_path: Path, telemetry: Telemetry
) -> None:
    path = write_log(tmp_path / "log.parquet", [("u", "z", 1.0, 1)] * 5)
    quarantine = Quarantine()

    def check(num_rows: int) -> None:
        assert num_rows == 5
        assert quarantine.reasons() == {"interactions": {"unknown_item": 5}}
        raise StageFailure("too many")

    with pytest.raises(StageFailure, match="too many"):
        interactions.clean(
            locations.find([path]), settings(path), ITEMS, quarantine=quarantine,
            work=tmp_path / "work", telemetry=telemetry, check=check,
        )  # fmt: skip


def test_a_log_of_no_rows_is_the_users_mistake(tmp_path: Path, telemetry: Telemetry) -> None:
    (tmp_path / "log.csv").write_text("user_id,item_id,r,t\n")
    with pytest.raises(UserError, match="is empty"):
        prepare(settings(str(tmp_path / "log.csv")), tmp_path / "out", telemetry)


def test_a_planted_leak_is_found_when_it_is_written(tmp_path: Path) -> None:
    rows = LabelledRows(
        user=np.array([3, 4, 3]),
        item=np.array([1, 1, 1]),
        rating=np.ones(3, dtype=np.float32),
        time=np.zeros(3, dtype=np.int64),
        label=np.array([0, 0, 2], dtype=np.int8),
    )
    with (
        InteractionFiles(tmp_path) as files,
        pytest.raises(UserError, match="user 3, item 1 in train and test"),
    ):
        files.add(rows)


@pytest.mark.parametrize("keep", ["last", "first"])
@pytest.mark.parametrize("times", [True, False])
def test_one_row_of_each_pair_stays(keep: str, times: bool) -> None:
    rng = np.random.default_rng(0)
    rows = Rows(
        user=rng.integers(0, 12, 300).astype(np.int32),
        item=rng.integers(0, 9, 300).astype(np.int32),
        rating=np.ones(300, dtype=np.float32),
        time=rng.integers(0, 5, 300) if times else np.full(300, log.UNKNOWN_TIME),
        row=np.arange(300),
    )
    best: dict[tuple[int, int], tuple[int, int]] = {}
    for row in range(300):
        pair, place = (int(rows.user[row]), int(rows.item[row])), (int(rows.time[row]), row)
        if pair not in best or (place > best[pair] if keep == "last" else place < best[pair]):
            best[pair] = place
    kept = buckets.distinct_pairs(rows, num_items=9, keep=keep)
    assert kept.tolist() == [best[pair][1] for pair in sorted(best)]


def test_no_rating_and_no_time_are_null(tmp_path: Path, telemetry: Telemetry) -> None:
    path = write_log(tmp_path / "log.parquet", random_log(10))
    config = settings(path, columns=InteractionColumns())
    found = prepare(config, tmp_path / "out", telemetry, buckets=2).rows()
    assert {values[1:] for values in found.values()} == {(None, None)}
    assert len(found) == len({row[:2] for row in random_log(10)})


def test_a_key_is_hashed_the_same_in_every_run() -> None:
    # Part of the format of a split: other numbers would move interactions between versions.
    assert hashing.hash_keys(pa.array(["user-1"])).tolist() == [16005154187258756048]


def test_reading_in_one_process_shows_every_run(
    tmp_path: Path, telemetry: Telemetry, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(
        settings(write_log(tmp_path / "log.parquet", random_log(11))), tmp_path / "out", telemetry
    )
    assert "400/400 log rows in" in capsys.readouterr().out


def test_keys_behind_2_gib_of_others_can_be_strings(tmp_path: Path) -> None:
    """The first key is a hole in a file."""
    size = 1 << 31
    with (tmp_path / "keys").open("w+b") as file:
        file.truncate(size)
        file.seek(size)
        file.write(b"abcde")
        file.flush()
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    offsets = np.array([0, size, size + 3, size + 5])
    base = pa.LargeStringArray.from_buffers(3, pa.py_buffer(offsets), pa.py_buffer(data))
    assert units.as_strings(base.slice(1)).to_pylist() == ["abc", "de"]


def test_known_users_are_found_in_any_bucket(
    tmp_path: Path, telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [f"user-{n},item-{n % 4},{n % 3},{n}\n" for n in range(40)]
    (tmp_path / "a.csv").write_text("user_id,item_id,r,t\n" + "".join(lines))
    base = [f"user-{n}" for n in range(60, 20, -3)]
    monkeypatch.setattr(interactions, "_HASHED_KEYS", 5)
    config = settings(str(tmp_path / "a.csv"))
    results = [
        prepare(config, tmp_path / f"{n}", telemetry, base=base, buckets=n) for n in (1, 3, 50)
    ]
    for result in results:
        users = pq.read_table(result.folder / "users.parquet")["user_key"].to_pylist()
        assert users[: len(base)] == base
        new = [f"user-{n}" for n in range(40)]
        assert users[len(base) :] == [key for key in new if key not in base]
        assert result.rows() == results[0].rows()
