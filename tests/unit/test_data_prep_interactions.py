"""Cleaning of the log against brute force, and every reason of its quarantine."""

import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from alignrec.errors import UserError
from data_prep import interactions
from data_prep.config import InteractionColumns, InteractionsConfig
from data_prep.interactions import Log, RawLog
from data_prep.quarantine import Quarantine

ITEMS = pa.array(["a", "b", "c"])
NANOSECONDS = 1_700_000_000_123_456_789


def numbers_log(seed: int, *, num_rows: int, times: bool = True) -> Log:
    rng = np.random.default_rng(seed)
    return Log(
        user=rng.integers(0, 12, num_rows),
        item=rng.integers(0, 9, num_rows),
        rating=rng.integers(1, 6, num_rows).astype(np.float32),
        timestamp=rng.integers(0, 5, num_rows),
        has_timestamp=np.full(num_rows, times),
    )


def raw_log(users: Any, items: Any, rating: Any = None, timestamp: Any = None) -> RawLog:
    def column(values: Any) -> pa.ChunkedArray | None:
        return None if values is None else pa.chunked_array([pa.array(values)])

    return RawLog(
        pa.array(users, pa.string()), pa.array(items, pa.string()), column(rating),
        column(timestamp), num_malformed=0,
    )  # fmt: skip


@pytest.mark.parametrize("keep", ["last", "first"])
@pytest.mark.parametrize("times", [True, False])
def test_one_row_of_each_pair_stays(keep: str, times: bool) -> None:
    log = numbers_log(0, num_rows=300, times=times)
    best: dict[tuple[int, int], int] = {}
    for row, pair in enumerate(zip(log.user.tolist(), log.item.tolist(), strict=True)):
        rank = (int(log.timestamp[row]) if times else 0, row)
        if pair in best:
            other = (int(log.timestamp[best[pair]]) if times else 0, best[pair])
            better = rank > other if keep == "last" else rank < other
        if pair not in best or better:
            best[pair] = row
    kept = interactions.distinct_pairs(log, keep=keep)
    assert kept.tolist() == sorted(best.values())


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("min_user", "min_item"), [(1, 1), (5, 5), (3, 8), (40, 40)])
def test_k_core_equals_brute_force(seed: int, min_user: int, min_item: int) -> None:
    log = numbers_log(seed, num_rows=110)
    rows = list(range(len(log)))
    while True:
        left = [
            r for r in rows
            if sum(log.user[s] == log.user[r] for s in rows) >= min_user
            and sum(log.item[s] == log.item[r] for s in rows) >= min_item
        ]  # fmt: skip
        if left == rows:
            break
        rows = left
    kept = interactions.k_core(log.user, log.item, min_user=min_user, min_item=min_item)
    assert np.flatnonzero(kept).tolist() == rows


def test_unusable_rows_are_listed_with_their_reason() -> None:
    raw = raw_log(
        ["u1", None, "u2", "", "u3", "u\x01", "u4", "u5", "u1"],
        ["a", "a", None, "b", "z", "a", "b", "c", "b"],
        rating=["5", "4", "3", "2", "1", "1", "five", "2", ""],
        timestamp=["1", "2", "3", "4", "5", "6", "7", "soon", "2020-02-01"],
    )
    quarantine = Quarantine()
    log, users = interactions.encode(raw, ITEMS, quarantine, need_timestamps=False)
    assert users.to_pylist() == ["u1"]
    assert log.user.tolist() == [0, 0]
    assert log.item.tolist() == [0, 1]
    assert log.rating[0] == 5.0
    assert np.isnan(log.rating[1])
    assert log.timestamp.tolist() == [1, 1580515200]
    assert quarantine.reasons() == {
        "interactions": {
            "missing_user": 2, "missing_item": 1, "unknown_item": 1, "invalid_key": 1,
            "bad_rating": 1, "bad_timestamp": 1,
        }
    }  # fmt: skip
    listed = {(row["key"], row["detail"]) for row in quarantine.table().to_pylist()}
    assert ("u3 -> z", "row 5") in listed


def test_times_are_needed_only_for_splits_by_time() -> None:
    raw = raw_log(["u", "u"], ["a", "b"], timestamp=[7, None])
    log, _ = interactions.encode(raw, ITEMS, Quarantine(), need_timestamps=False)
    assert log.has_timestamp.tolist() == [True, False]
    log, _ = interactions.encode(raw, ITEMS, Quarantine(), need_timestamps=True)
    assert len(log) == 1


@pytest.mark.parametrize(
    ("values", "seconds"),
    [
        ([1.0, 2.0], [1, 2]),
        (["10", " 11.0 "], [10, 11]),
        ([datetime.datetime(2020, 2, 1), None], [1580515200, None]),
        ([datetime.date(2020, 2, 1), datetime.date(1970, 1, 1)], [1580515200, 0]),
        (["2020-02-01 00:00:10", "2020-02-01T00:00:10Z"], [1580515210, 1580515210]),
        (
            ["2020-02-01T00:00:10.999", "2020-02-01T01:30:10.5+01:30", "2020-02-01 00:00:10+00:00"],
            [1580515210] * 3,
        ),
        ([datetime.datetime(2020, 2, 1, tzinfo=datetime.UTC)], [1580515200]),
        (["1.7e9", "1e1", ".5", "12.75"], [1_700_000_000, 10, 0, 12]),
        ([float("nan"), 3.0], [None, 3]),
        ([NANOSECONDS, NANOSECONDS + 1, 5], [NANOSECONDS, NANOSECONDS + 1, 5]),
        ([str(NANOSECONDS), f"{NANOSECONDS + 1}.0"], [NANOSECONDS, NANOSECONDS + 1]),
        ([None, None], [None, None]),
    ],
)
def test_times_of_any_type_become_seconds(values: Any, seconds: list[int | None]) -> None:
    column = pa.chunked_array([pa.array(values)])
    time, known, bad = interactions.to_timestamps(column, len(values))
    found = [t if k else None for t, k in zip(time.tolist(), known.tolist(), strict=True)]
    assert found == seconds
    assert not bad.any()


@pytest.mark.parametrize(
    "value", ["9" * 19, "1e400", "-inf", "1e", ".", "2020-02-01T00", 2**63 - 1]
)
def test_what_is_no_time_is_unreadable(value: Any) -> None:
    column = pa.chunked_array([pa.array([value])])
    _, _, bad = interactions.to_timestamps(column, 1)
    assert bad.all()


def test_ratings_of_any_notation_become_numbers() -> None:
    column = pa.chunked_array([pa.array(["4", ".5", "1e1", "", "1e400"])])
    rating, bad = interactions.to_ratings(column, 5)
    assert rating[:3].tolist() == [4.0, 0.5, 10.0]
    assert bad.tolist() == [False] * 4 + [True]
    _, bad = interactions.to_ratings(pa.chunked_array([pa.array([NANOSECONDS])]), 1)
    assert bad.all()


def test_cleaning_counts_every_dropped_row() -> None:
    log = numbers_log(1, num_rows=400)
    config = InteractionsConfig(
        columns=InteractionColumns(rating="r"),
        min_rating=3.0,
        min_user_interactions=4,
        min_item_interactions=4,
    )
    cleaned, rows = interactions.clean(log, config)
    assert (cleaned.rating >= 3).all()
    assert rows["left"] == len(cleaned)
    dropped = rows["below_min_rating"] + rows["repeated"] + rows["outside_of_core"]
    assert rows["usable"] - dropped == len(cleaned)


def test_nothing_left_is_the_users_mistake() -> None:
    log = numbers_log(2, num_rows=50)
    with pytest.raises(UserError, match="no interaction is left"):
        interactions.clean(log, InteractionsConfig(min_user_interactions=100))


def test_renumbering_closes_gaps_and_keeps_the_order() -> None:
    values, old = interactions.renumber(np.array([5, 2, 5, 9]), 12)
    assert values.tolist() == [1, 0, 1, 2]
    assert old.tolist() == [2, 5, 9]
