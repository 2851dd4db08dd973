"""Ratings and times of any notation, and what is none."""

import datetime
from typing import Any

import pyarrow as pa
import pytest

from data_prep import values

NANOSECONDS = 1_700_000_000_123_456_789


@pytest.mark.parametrize(
    ("given", "seconds"),
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
        (["2024-02-29", "2000-02-29"], [1709164800, 951782400]),
        (["1.7e9", "1e1", ".5", "12.75"], [1_700_000_000, 10, 0, 12]),
        ([float("nan"), 3.0], [None, 3]),
        ([NANOSECONDS, NANOSECONDS + 1, 5], [NANOSECONDS, NANOSECONDS + 1, 5]),
        ([str(NANOSECONDS), f"{NANOSECONDS + 1}.0"], [NANOSECONDS, NANOSECONDS + 1]),
        ([None, None], [None, None]),
    ],
)
def test_times_of_any_type_become_seconds(given: Any, seconds: list[int | None]) -> None:
    column = pa.chunked_array([pa.array(given)])
    time, known, bad = values.to_timestamps(column, len(given))
    found = [t if k else None for t, k in zip(time.tolist(), known.tolist(), strict=True)]
    assert found == seconds
    assert not bad.any()


@pytest.mark.parametrize(
    "value",
    [
        "9" * 19, "1e400", "-inf", "1e", ".", "2020-02-01T00", 2**63 - 1, "2023-02-31",
        "2023-02-29 10:00:00", "2023-04-31T10:00:00+02:00", "2023-13-01", "2023-01-00",
        "2023-01-01 24:00:00",
    ],
)  # fmt: skip
def test_what_is_no_time_is_unreadable(value: Any) -> None:
    column = pa.chunked_array([pa.array([value])])
    _, _, bad = values.to_timestamps(column, 1)
    assert bad.all()


def test_ratings_of_any_notation_become_numbers() -> None:
    column = pa.chunked_array([pa.array(["4", ".5", "1e1", "", "1e400"])])
    rating, bad = values.to_ratings(column, 5)
    assert rating[:3].tolist() == [4.0, 0.5, 10.0]
    assert bad.tolist() == [False] * 4 + [True]
    _, bad = values.to_ratings(pa.chunked_array([pa.array([NANOSECONDS])]), 1)
    assert bad.all()
