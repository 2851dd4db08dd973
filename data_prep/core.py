"""Compact buckets in, the items of the k-core out (buckets -> splits).

Which rows of a bucket are in the core is a function of the items that are alive, so nothing but
these is kept from round to round: a task compares the rows under the items of the round before with
those under the items of this one, and returns how many rows each item lost.
"""

import dataclasses
from pathlib import Path

import numpy as np

from data_prep import units
from data_prep.buckets import ITEM_COUNTS, BucketPlan, core_rows
from data_prep.engine import Tasks
from data_prep.values import Bools, Ints

_ROUND = "round-{:05d}"


@dataclasses.dataclass(frozen=True)
class CorePlan:
    """What the tasks of one round share.

    Attributes:
        buckets: the compact buckets.
        round: number of the round, from 1.
        folder: of all rounds; holds the items that are alive after each.
    """

    buckets: BucketPlan
    round: int
    folder: Path

    def alive(self, round_: int) -> Bools:
        """Return which items are alive in a round; in round 0 all are."""
        return units.load(self.folder, _ROUND.format(round_))

    def unit(self, bucket: int) -> Path:
        """Return the folder of what a bucket lost in this round."""
        return self.folder / _ROUND.format(self.round) / f"{bucket:06d}"


@dataclasses.dataclass(frozen=True)
class Core:
    """The k-core of the log.

    Attributes:
        alive: (num_items,) items that no round took out.
        item_counts: (num_items,) interactions left of each item.
        num_rounds: rounds that took items out.
    """

    alive: Bools
    item_counts: Ints
    num_rounds: int


def find_core(plan: BucketPlan, folder: Path, tasks: Tasks) -> Core:
    """Drop rare items, then users with too few rows left, until nothing changes.

    Args:
        plan: the compact buckets.
        folder: receives what a killed run goes on from.
        tasks: where buckets are worked on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    num_buckets = plan.log.num_buckets
    at_first = [units.load(plan.unit(bucket), ITEM_COUNTS) for bucket in range(num_buckets)]
    counts = np.zeros(plan.num_items, dtype=np.int64)
    for of_bucket in at_first:
        counts += of_bucket
    alive = np.ones(plan.num_items, dtype=bool)
    _save_alive(folder, 0, alive)
    number = 0
    while True:
        rare = np.flatnonzero((counts > 0) & (counts < plan.config.min_item_interactions))
        if not len(rare):
            return Core(alive, counts, number)
        number += 1
        alive[rare] = False
        _save_alive(folder, number, alive)
        touched = [bucket for bucket, of_bucket in enumerate(at_first) if of_bucket[rare].any()]
        round_ = CorePlan(plan, number, folder)
        tasks.run(
            lose_rare_items,
            touched,
            round_,
            unit=round_.unit,
            what="core buckets",
            note=f"round {number}, {len(rare):,} items out",
        )
        for bucket in touched:
            lost = round_.unit(bucket)
            counts[units.load(lost, "items")] -= units.load(lost, "counts")


def lose_rare_items(bucket: int, plan: CorePlan) -> int:
    """Write how many rows each item loses in this round, with the users that go.

    Returns:
        Rows lost.
    """
    unit = plan.buckets.unit(bucket)
    item, start = units.load(unit, "item"), units.load(unit, "start")
    before, after = (
        core_rows(
            item,
            start,
            plan.alive(round_),
            min_user=plan.buckets.config.min_user_interactions,
        )
        for round_ in (plan.round - 1, plan.round)
    )
    lost = item[before & ~after]
    items, counts = np.unique(lost, return_counts=True)
    with units.writing(plan.unit(bucket)) as folder:
        units.save(folder, items=items, counts=counts)
    return len(lost)


def _save_alive(folder: Path, round_: int, alive: Bools) -> None:
    """Write the items of a round so that a task sees all of them or none."""
    spare = folder / ".alive.npy"
    np.save(spare, alive)
    spare.replace(folder / f"{_ROUND.format(round_)}.npy")
