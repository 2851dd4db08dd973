"""What was left out and why, and how much of that is too much (every step -> artifact)."""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.data import schema
from alignrec.errors import StageFailure

DETAIL_CHARACTERS = 200


class Reason(StrEnum):
    """Why something is in quarantine; the vocabulary is part of the dataset's format."""

    MALFORMED_ROW = "malformed_row"
    MISSING_KEY = "missing_key"
    INVALID_KEY = "invalid_key"
    DUPLICATE_KEY = "duplicate_key"
    IMAGE_MISSING = "image_missing"
    IMAGE_FORBIDDEN = "image_forbidden_location"
    IMAGE_UNREADABLE = "image_unreadable"
    IMAGE_EMPTY = "image_empty"
    IMAGE_TOO_LARGE = "image_file_too_large"
    IMAGE_NOT_AN_IMAGE = "image_unknown_format"
    IMAGE_TOO_MANY_PIXELS = "image_too_many_pixels"
    IMAGE_TOO_SMALL = "image_too_small"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_CORRUPT = "image_corrupt"
    MISSING_USER = "missing_user"
    MISSING_ITEM = "missing_item"
    UNKNOWN_ITEM = "unknown_item"
    BAD_RATING = "bad_rating"
    BAD_TIMESTAMP = "bad_timestamp"
    BAD_LABEL = "bad_split_label"


@dataclasses.dataclass
class Quarantine:
    """The list of what was left out, in the order of the data."""

    tables: list[pa.Table] = dataclasses.field(default_factory=list)

    def add(self, source: str, rows: Iterable[tuple[str, Reason, str]]) -> None:
        """Add (key, reason, detail) rows of one source."""
        listed = list(rows)
        if listed:
            keys, reasons, details = zip(*listed, strict=True)
            self.tables.append(make_table(source, keys, reasons, details))

    def add_columns(
        self, source: str, keys: pa.ChunkedArray, reason: Reason, details: pa.Array
    ) -> None:
        """Add many rows of one reason, given as columns."""
        if len(keys):
            arrays = [
                pa.repeat(source, len(keys)),
                pc.fill_null(keys, ""),
                pa.repeat(reason.value, len(keys)),
                details,
            ]
            self.tables.append(pa.table(arrays, schema=schema.QUARANTINE))

    def table(self) -> pa.Table:
        """Return all rows."""
        return pa.concat_tables([schema.QUARANTINE.empty_table(), *self.tables])

    def reasons(self) -> dict[str, dict[str, int]]:
        """Return source -> reason -> number of rows."""
        result: dict[str, Counter[str]] = {}
        groups = self.table().group_by(["source", "reason"]).aggregate([([], "count_all")])
        for row in groups.sort_by([("source", "ascending"), ("reason", "ascending")]).to_pylist():
            result.setdefault(row["source"], Counter())[row["reason"]] = row["count_all"]
        return {source: dict(counts) for source, counts in result.items()}

    def write(self, path: Path) -> None:
        """Write the table."""
        pq.write_table(self.table(), path)


def make_table(
    source: str, keys: Iterable[str], reasons: Iterable[Reason], details: Iterable[str]
) -> pa.Table:
    """Return rows of one source as a table with details of bounded length."""
    columns = {
        "key": list(keys),
        "reason": [reason.value for reason in reasons],
        "detail": [clean_detail(detail) for detail in details],
    }
    columns = {"source": [source] * len(columns["key"]), **columns}
    return pa.table(columns, schema=schema.QUARANTINE)


def clean_detail(text: str) -> str:
    """Return text on one line, printable and short; it may come from hostile data."""
    line = " ".join(text.encode("utf-8", "replace").decode().split())
    return "".join(c if c.isprintable() else "?" for c in line)[:DETAIL_CHARACTERS]


def check_budget(
    source: str, counts: Mapping[str, int], total: int, *, max_fraction: float, listed_in: Path
) -> None:
    """Fail the stage when too much of one source is bad.

    Args:
        source: what is bad and where it lies, e.g. "images of /data".
        counts: reason -> number of bad rows.
        total: rows looked at, good and bad.
        max_fraction: ``max_bad_fraction`` of the recipe.
        listed_in: file in which the user finds the bad rows.

    Raises:
        StageFailure: with the counts by reason.
    """
    bad = sum(counts.values())
    if bad <= max_fraction * total:
        return
    by_reason = ", ".join(
        f"{reason} {count:,}" for reason, count in sorted(counts.items(), key=lambda c: -c[1])
    )
    raise StageFailure(
        f"{bad:,} of {total:,} {source} ({bad / total:.1%}) are bad, more than max_bad_fraction="
        f"{max_fraction}: {by_reason}. They are listed in {listed_in}. Correct the data, or raise "
        f"data_prep.max_bad_fraction."
    )
