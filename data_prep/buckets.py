"""Coded rows of one bucket in, its distinct interactions as compact arrays out (log -> core).

A bucket holds all rows of its users. Its unit has, in the order of users' first usable rows:
``first_row``, ``hash`` (num_users,) and ``keys.arrow``; ``start`` (num_users + 1,) rows of each
user; and by user and item ``item``, ``rating``, ``time`` (num_rows,).
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from alignrec.artifacts import write_json
from data_prep import units
from data_prep.config import InteractionsConfig
from data_prep.log import UNKNOWN_TIME, LogPlan, read_bucket
from data_prep.values import Bools, Ints

ITEM_COUNTS = "item_counts"
Int32s = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class BucketPlan:
    """What the tasks on buckets share.

    Attributes:
        log: how the log was read.
        num_pieces: pieces that it was read in.
        num_items: items in the catalogue.
        config: how interactions are cleaned.
        folder: receives a unit for each bucket.
    """

    log: LogPlan
    num_pieces: int
    num_items: int
    config: InteractionsConfig
    folder: Path

    def unit(self, bucket: int) -> Path:
        """Return the folder of a bucket."""
        return self.folder / f"{bucket:06d}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Interactions of a bucket.

    Attributes:
        user: (n,) number of the user in the bucket.
        item: (n,) number of the item in the catalogue.
        rating: (n,) NaN where unknown.
        time: (n,) ``UNKNOWN_TIME`` where unknown.
        row: (n,) place in the log.
    """

    user: Int32s
    item: Int32s
    rating: Floats
    time: Ints
    row: Ints

    def __len__(self) -> int:
        return len(self.user)

    def select(self, rows: Ints | Bools) -> "Rows":
        """Return the given rows."""
        fields = dataclasses.fields(self)
        return Rows(**{field.name: getattr(self, field.name)[rows] for field in fields})


def compact(bucket: int, plan: BucketPlan) -> int:
    """Apply the rating threshold and drop repeated pairs; write the bucket's unit.

    Returns:
        Interactions left.
    """
    with units.writing(plan.unit(bucket)) as folder:
        keys, hashes, first_row, rows = _gather(bucket, plan)
        usable = len(rows)
        if plan.config.min_rating is not None:
            # NaN compares False: unrated rows go.
            rows = rows.select(rows.rating >= plan.config.min_rating)
        rated = len(rows)
        rows = rows.select(
            distinct_pairs(rows, num_items=plan.num_items, keep=plan.config.duplicates)
        )
        start = np.concatenate([[0], np.cumsum(np.bincount(rows.user, minlength=len(keys)))])
        kept = core_rows(rows.item, start, None, min_user=plan.config.min_user_interactions)
        units.save_strings(folder / "keys.arrow", keys)
        units.save(
            folder,
            hash=hashes,
            first_row=first_row,
            start=start,
            item=rows.item,
            rating=rows.rating,
            time=rows.time,
            **{ITEM_COUNTS: count_items(rows.item[kept], plan.num_items)},
        )
        dropped = {"below_min_rating": usable - rated, "repeated": rated - len(rows)}
        write_json(folder / "facts.json", dropped)
    return len(rows)


def distinct_pairs(rows: Rows, *, num_items: int, keep: str) -> Ints:
    """Return the rows to keep so that no (user, item) occurs twice, by user and then item.

    Of a pair's rows the last (or first) by time stays, and among equal or unknown times the last
    (first) of the log.
    """
    pair = rows.user.astype(np.int64) * num_items + rows.item
    order: Ints = np.argsort(pair)
    ordered = pair[order]
    same = np.concatenate([[False], ordered[1:] == ordered[:-1]])  # as the one before
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    if not repeated.any():
        return order
    few = order[repeated]
    order[repeated] = few[np.lexsort((rows.row[few], rows.time[few], pair[few]))]
    edge = np.concatenate([~same[1:], [True]]) if keep == "last" else ~same
    kept: Ints = order[edge]
    return kept


def core_rows(item: Int32s, start: Ints, alive: Bools | None, *, min_user: int) -> Bools:
    """Return the rows whose item is alive and whose user has enough of such rows.

    Args:
        item: (n,) items, user by user.
        start: (num_users + 1,) rows of each user.
        alive: (num_items,) items that are still in the core; None: all.
        min_user: least rows of a user that stays.
    """
    kept: Bools = np.ones(len(item), dtype=bool) if alive is None else alive[item]
    if min_user <= 1:
        return kept
    before = np.concatenate([[0], np.cumsum(kept)])
    enough = before[start[1:]] - before[start[:-1]] >= min_user
    kept &= np.repeat(enough, np.diff(start))
    return kept


def count_items(item: Int32s, num_items: int) -> Int32s:
    """Return how often each item occurs."""
    return np.bincount(item, minlength=num_items).astype(np.int32)


def _gather(bucket: int, plan: BucketPlan) -> tuple[pa.Array, npt.NDArray[np.uint64], Ints, Rows]:
    """Join the bucket's runs: key, hash and first row of every user, and the rows."""
    user_parts, row_parts = [], []
    for piece in range(plan.num_pieces):
        for users, rows in read_bucket(plan.log.unit(piece), bucket):
            user_parts.append(users)
            row_parts.append(rows)
    if not row_parts:
        return _nobody()
    entries = pa.Table.from_batches(user_parts).combine_chunks()
    encoded = entries["key"].combine_chunks().dictionary_encode()
    number = encoded.indices.to_numpy()
    _, first_entry = np.unique(number, return_index=True)  # runs are in the order of the log
    first_row = entries["first_row"].to_numpy()[first_entry]
    order = np.argsort(first_row)
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order))
    hashes = entries["hash"].to_numpy()[first_entry[order]]
    rows = _join_rows(row_parts, rank[number], [len(users) for users in user_parts])
    return encoded.dictionary.take(pa.array(order)), hashes, first_row[order], rows


def _join_rows(
    parts: Sequence[pa.RecordBatch], user_of_entry: Int32s, num_entries: Sequence[int]
) -> Rows:
    names = parts[0].schema.names
    num_rows = sum(map(len, parts))
    first_entries = np.cumsum([0, *num_entries[:-1]])

    def column(name: str) -> npt.NDArray[Any]:
        return np.concatenate([part[name].to_numpy() for part in parts])

    return Rows(
        user=np.concatenate(
            [
                user_of_entry[first + part["user"].to_numpy()]
                for first, part in zip(first_entries, parts, strict=True)
            ]
        ),
        item=column("item"),
        rating=column("rating") if "rating" in names else np.full(num_rows, np.nan, np.float32),
        time=column("time") if "time" in names else np.full(num_rows, UNKNOWN_TIME),
        row=column("row"),
    )


def _nobody() -> tuple[pa.Array, npt.NDArray[np.uint64], Ints, Rows]:
    none = np.zeros(0, dtype=np.int64)
    few = none.astype(np.int32)
    rows = Rows(few, few, none.astype(np.float32), none, none)
    return pa.array([], pa.string()), none.astype(np.uint64), none, rows
