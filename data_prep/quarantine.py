"""What was left out and why, and how much of that is too much (every step -> artifact)."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.data import schema
from alignrec.errors import StageFailure

DETAIL_CHARACTERS = 200
_ROWS_IN_MEMORY = 200_000
_GROUP_ROWS = 65_536


class Reason(StrEnum):
    """Why something is in quarantine; the vocabulary is part of the dataset's format."""

    MALFORMED_ROW = "malformed_row"
    MISSING_KEY = "missing_key"
    INVALID_KEY = "invalid_key"
    DUPLICATE_KEY = "duplicate_key"
    IMAGE_MISSING = "image_missing"
    IMAGE_FORBIDDEN = "image_forbidden_location"
    IMAGE_BAD_URL = "image_bad_url"
    IMAGE_UNREACHABLE = "image_host_unreachable"
    IMAGE_TIMED_OUT = "image_timed_out"
    IMAGE_HTTP_ERROR = "image_http_error"
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


Counts = dict[str, dict[str, int]]


@dataclasses.dataclass
class Quarantine:
    """The list of what was left out, in the order of the data.

    It is a list of parts: tables that this process made, and files that tasks wrote. Only counts
    are kept of what lies in files.

    Attributes:
        folder: receives what does not fit into memory; None: everything fits.
    """

    folder: Path | None = None
    _parts: list[pa.Table | Path] = dataclasses.field(default_factory=list)
    _counts: dict[str, Counter[str]] = dataclasses.field(default_factory=dict)
    _rows_in_memory: int = 0

    def __post_init__(self) -> None:
        """Forget what a killed run listed: it is found again."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, source: str, rows: Iterable[tuple[str, Reason, str]]) -> None:
        """Add (key, reason, detail) rows of one source."""
        listed = list(rows)
        if listed:
            keys, reasons, details = zip(*listed, strict=True)
            self.add_table(make_table(source, keys, reasons, details))

    def add_columns(
        self, source: str, keys: pa.ChunkedArray, reason: Reason, details: pa.Array
    ) -> None:
        """Add many rows of one reason, given as columns."""
        if len(keys):
            reasons = pa.repeat(reason.value, len(keys))
            self.add_table(column_table(source, keys, reasons, details))

    def add_table(self, table: pa.Table) -> None:
        """Add rows that this process made."""
        if not len(table):
            return
        self._count(count_reasons(table))
        self._parts.append(table)
        self._rows_in_memory += len(table)
        if self.folder is not None and self._rows_in_memory > _ROWS_IN_MEMORY:
            self._spill(self.folder)

    def add_file(self, path: Path, counts: Mapping[str, Mapping[str, int]] | None = None) -> None:
        """Add the rows of a file that a task wrote; it must stay until ``write``.

        Args:
            path: a parquet file of the quarantine's schema.
            counts: source -> reason -> number of rows; None: they are counted here.
        """
        if counts is None:
            counts = count_reasons(pq.read_table(path, columns=["source", "reason"]))
        if counts:
            self._count(counts)
            self._parts.append(path)

    def table(self) -> pa.Table:
        """Return all rows."""
        return pa.concat_tables([schema.QUARANTINE.empty_table(), *self._tables()])

    def reasons(self) -> Counts:
        """Return source -> reason -> number of rows."""
        return {
            source: dict(sorted(counts.items())) for source, counts in sorted(self._counts.items())
        }

    def write(self, path: Path) -> None:
        """Write all rows, in row groups that do not depend on the parts."""
        with pq.ParquetWriter(path, schema.QUARANTINE) as writer:
            for group in _regrouped(self._tables()):
                writer.write_table(group)

    def _count(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        for source, by_reason in counts.items():
            self._counts.setdefault(source, Counter()).update(by_reason)

    def _spill(self, folder: Path) -> None:
        """Move the tables in memory to files; the order stays."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, part in enumerate(self._parts):
            if isinstance(part, pa.Table):
                path = folder / f"{index:06d}.parquet"
                pq.write_table(part, path)
                self._parts[index] = path
        self._rows_in_memory = 0

    def _tables(self) -> Iterator[pa.Table]:
        for part in self._parts:
            if isinstance(part, pa.Table):
                yield part
                continue
            for batch in pq.ParquetFile(part).iter_batches(_GROUP_ROWS):
                yield pa.Table.from_batches([batch], schema.QUARANTINE)


def _regrouped(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of all tables again, ``_GROUP_ROWS`` at a time."""
    waiting = schema.QUARANTINE.empty_table()
    for table in tables:
        waiting = pa.concat_tables([waiting, table])
        while len(waiting) >= _GROUP_ROWS:
            yield waiting.slice(0, _GROUP_ROWS).combine_chunks()
            waiting = waiting.slice(_GROUP_ROWS)
    if len(waiting):
        yield waiting.combine_chunks()


def count_reasons(table: pa.Table) -> Counts:
    """Return source -> reason -> number of rows of a table of the quarantine's schema."""
    result: Counts = {}
    groups = table.group_by(["source", "reason"]).aggregate([([], "count_all")])
    for row in groups.sort_by([("source", "ascending"), ("reason", "ascending")]).to_pylist():
        result.setdefault(row["source"], {})[row["reason"]] = row["count_all"]
    return result


def column_table(
    source: str, keys: pa.ChunkedArray | pa.Array, reasons: pa.Array, details: pa.Array
) -> pa.Table:
    """Return rows of one source, given as columns, as a table; a missing key becomes empty."""
    arrays = [pa.repeat(source, len(keys)), pc.fill_null(keys, ""), reasons, details]
    return pa.table(arrays, schema=schema.QUARANTINE)


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
