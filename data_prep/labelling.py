"""Compact buckets and the core in, the core's rows with their split out (core -> interactions).

A bucket's unit has what that of ``buckets`` has, of the users and rows in the core alone, and
``label``: the split of each row.
"""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from data_prep import splits, units
from data_prep.buckets import BucketPlan, Floats, Int32s, core_rows
from data_prep.config import SplitConfig
from data_prep.engine import Tasks
from data_prep.hashing import hash_keys
from data_prep.splits import Cuts, Histories
from data_prep.values import Bools, Ints

_DIGIT_BITS = 16
_NUM_DIGITS = 1 << _DIGIT_BITS
ALIVE, ITEM_HASHES = "alive", "item_hashes"


@dataclasses.dataclass(frozen=True)
class LabelPlan:
    """What the tasks share.

    Attributes:
        buckets: the compact buckets.
        split: how interactions are split.
        cuts: moments of the split by global time.
        shared: folder of the items of the core, and of the hash of every item's key.
        folder: receives a unit for each bucket.
    """

    buckets: BucketPlan
    split: SplitConfig
    cuts: Cuts | None
    shared: Path
    folder: Path

    def unit(self, bucket: int) -> Path:
        """Return the folder of a bucket."""
        return self.folder / f"{bucket:06d}"


def save_shared(folder: Path, alive: Bools, item_keys: pa.Array) -> None:
    """Write what all tasks read: the items of the core, and the hash of every item's key."""
    if folder.is_dir():
        return
    with units.writing(folder) as draft:
        units.save(draft, **{ALIVE: alive, ITEM_HASHES: hash_keys(item_keys)})


def find_cuts(plan: LabelPlan, num_rows: int, tasks: Tasks) -> Cuts:
    """Return the moments of the split by global time.

    They are order statistics of the times of the core: found digit by digit from the highest on, by
    counting in four passes over the time column.
    """
    ranks = splits.cut_ranks(num_rows, held_out=plan.split.held_out)
    prefixes = [0 if rank is not None else None for rank in ranks]
    left = [rank or 0 for rank in ranks]
    for shift in range(64 - _DIGIT_BITS, -1, -_DIGIT_BITS):
        search = Search(plan, shift, tuple(p for p in prefixes if p is not None))
        numbers = range(plan.buckets.log.num_buckets)
        counts = tasks.total(count_digits, numbers, search, what="times")  # (prefixes, digits)
        for index, prefix in enumerate(prefixes):
            if prefix is not None:
                below = np.cumsum(counts[search.prefixes.index(prefix)])
                digit = int(np.searchsorted(below, left[index], side="right"))
                left[index] -= int(below[digit - 1]) if digit else 0
                prefixes[index] = (prefix << _DIGIT_BITS) | digit
    valid, test = (None if prefix is None else prefix - (1 << 63) for prefix in prefixes)
    return Cuts(valid, test)


@dataclasses.dataclass(frozen=True)
class Search:
    """One pass of the search for the cuts.

    Attributes:
        plan: the buckets.
        shift: bits below the digit that is counted.
        prefixes: digits above it that are searched for, as numbers.
    """

    plan: LabelPlan
    shift: int
    prefixes: tuple[int, ...]


def count_digits(bucket: int, search: Search) -> Ints:
    """Return how often each digit follows each prefix among the times of a bucket's core."""
    unit = search.plan.buckets.unit(bucket)
    bits = splits.ordered_bits(
        np.asarray(units.load(unit, "time"))[_kept_rows(bucket, search.plan)]
    )
    digits = bits >> np.uint64(search.shift)
    counts = np.zeros((len(search.prefixes), _NUM_DIGITS), dtype=np.int64)
    for row, prefix in enumerate(search.prefixes):
        low = digits - np.uint64(prefix << _DIGIT_BITS)  # wraps around where it is below
        counts[row] = np.bincount(low[low < _NUM_DIGITS].astype(np.int64), minlength=_NUM_DIGITS)
    return counts


def label(bucket: int, plan: LabelPlan) -> int:
    """Write the core's users and rows of a bucket with their split.

    Returns:
        Their number of rows.
    """
    source = plan.buckets.unit(bucket)
    kept = _kept_rows(bucket, plan)
    start = units.load(source, "start")
    num_rows = np.diff(np.concatenate([[0], np.cumsum(kept)])[start])
    users = np.flatnonzero(num_rows)
    item, time = (units.load(source, name)[kept] for name in ("item", "time"))
    num_rows = num_rows[users]
    user = np.repeat(np.arange(len(users)), num_rows)
    histories = Histories(
        user=user,
        user_hash=units.load(source, "hash")[users][user],
        item_hash=units.load(plan.shared, ITEM_HASHES)[item],
        time=time,
    )
    with units.writing(plan.unit(bucket)) as folder:
        keys = units.load_strings(source / "keys.arrow").take(pa.array(users))
        units.save_strings(folder / "keys.arrow", keys)
        units.save(
            folder,
            first_row=units.load(source, "first_row")[users],
            start=np.concatenate([[0], np.cumsum(num_rows)]),
            item=item,
            rating=units.load(source, "rating")[kept],
            time=time,
            label=splits.split(histories, plan.split, plan.cuts),
        )
    return len(item)


@dataclasses.dataclass(frozen=True)
class LabelledBucket:
    """What ``label`` wrote, mapped into memory.

    Attributes:
        keys: (num_users,) key of each user.
        first_row: (num_users,) place in the log of each user's first usable row; rising.
        start: (num_users + 1,) rows of each user.
        item: (num_rows,) number of the item in the catalogue.
        rating: (num_rows,)
        time: (num_rows,)
        label: (num_rows,) split.
    """

    keys: pa.Array
    first_row: Ints
    start: Ints
    item: Int32s
    rating: Floats
    time: Ints
    label: npt.NDArray[np.int8]

    @classmethod
    def open(cls, unit: Path) -> "LabelledBucket":
        """Map a bucket's unit."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "keys"]
        return cls(
            keys=units.load_strings(unit / "keys.arrow"),
            **{name: units.load(unit, name) for name in names},
        )


def _kept_rows(bucket: int, plan: LabelPlan) -> Bools:
    unit = plan.buckets.unit(bucket)
    alive = units.load(plan.shared, ALIVE)
    return core_rows(
        units.load(unit, "item"),
        units.load(unit, "start"),
        alive,
        min_user=plan.buckets.config.min_user_interactions,
    )
