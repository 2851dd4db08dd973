"""Interaction log in, users and interactions of the artifact out, in bounded memory.

``clean`` reads the log and decides which rows stay and in which split; ``write`` numbers the users
and writes the files. Between the two the caller decides which items get which item_index. The log
lies in buckets of users below a work folder, and every step is made of units that a killed run does
not make again; no result depends on the number of buckets or of workers.
"""

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.data import schema
from alignrec.errors import UserError
from alignrec.telemetry import Telemetry
from data_prep import buckets, engine, labelling, log, units
from data_prep.buckets import BucketPlan
from data_prep.config import TIME_STRATEGIES, DataPrepConfig
from data_prep.core import Core, find_core
from data_prep.engine import Tasks
from data_prep.hashing import bucket_of, hash_keys
from data_prep.interaction_files import InteractionFiles, LabelledRows, user_ranges
from data_prep.labelling import LabelledBucket, LabelPlan
from data_prep.locations import Piece, RawFile
from data_prep.log import LogPlan
from data_prep.quarantine import Quarantine
from data_prep.tables import Columns, check_columns, pieces
from data_prep.values import Bools, Ints

_PIECE_BYTES = 32 << 20
_HASHED_KEYS = 1 << 20
_QUANTILES = (0.0, 0.25, 0.5, 0.75, 0.95, 1.0)


@dataclasses.dataclass(frozen=True)
class Cleaned:
    """The cleaned log, in buckets on disk.

    Attributes:
        interacted: (num_items,) items of the catalogue that an interaction is left of.
        num_rows: rows of the log, good and bad.
        facts: what each step dropped, and how popular items are.
        plan: where the buckets are.
    """

    interacted: Bools
    num_rows: int
    facts: dict[str, Any]
    plan: LabelPlan


@dataclasses.dataclass(frozen=True)
class Written:
    """What ``write`` wrote.

    Attributes:
        counts: num_users, num_train, num_valid, num_test.
        facts: how active users are, and what ``clean`` dropped.
    """

    counts: dict[str, int]
    facts: dict[str, Any]


def clean(
    files: Sequence[RawFile],
    config: DataPrepConfig,
    item_keys: pa.Array,
    *,
    quarantine: Quarantine,
    work: Path,
    telemetry: Telemetry,
    check: Callable[[int], None] = lambda _: None,
) -> Cleaned:
    """Read the log, drop what cannot be used or is not wanted, and split what is left.

    Args:
        files: the log.
        config: columns, cleaning, split, and how many CPUs are used.
        item_keys: key of every item of the catalogue.
        quarantine: receives the unusable rows.
        work: folder that survives a kill; the buckets stay there until ``write``.
        telemetry: shows the progress.
        check: called with the number of rows when all unusable ones are in quarantine; raises to
            stop.

    Raises:
        UserError: the log is empty or unreadable, lacks a column, or nothing is left of it.
    """
    num_buckets = -(-max(log.estimate_rows(files), 1) // config.interactions.rows_per_task)
    # What a run with other buckets or items left is of no use to this one.
    state = hashlib.blake2b(hash_keys(item_keys).tobytes(), digest_size=8).hexdigest()
    folder = work.absolute() / f"interactions-{num_buckets}-{state}"  # tasks run elsewhere
    folder.mkdir(parents=True, exist_ok=True)
    units.save_strings(folder / "item_keys.arrow", item_keys)
    log_plan = LogPlan(
        columns=config.interactions.columns,
        item_keys=folder / "item_keys.arrow",
        num_buckets=num_buckets,
        need_timestamps=config.split.strategy in TIME_STRATEGIES,
        drop_unknown_items=config.interactions.unknown_items == "drop",
        name_files=len(files) > 1,
        folder=folder / "log",
    )
    parts = list(enumerate(pieces(files, max_bytes=_PIECE_BYTES)))
    tasks = Tasks(config, telemetry)
    uses_ray = engine.in_parallel(max(len(parts), num_buckets), config)
    with engine.session(config) if uses_ray else contextlib.nullcontext():
        facts = _read(files, parts, log_plan, quarantine, tasks)
        check(facts["rows"])
        plan = BucketPlan(
            log=log_plan,
            num_pieces=len(parts),
            num_items=len(item_keys),
            config=config.interactions,
            folder=folder / "buckets",
        )
        numbers = range(num_buckets)
        tasks.run(buckets.compact, numbers, plan, unit=plan.unit, what="log buckets")
        core = find_core(plan, folder / "core", tasks)
        facts |= _dropped(plan, core, facts["usable"])
        label_plan = LabelPlan(
            buckets=plan, split=config.split, cuts=None, shared=folder / "shared",
            folder=folder / "labelled",
        )  # fmt: skip
        labelling.save_shared(label_plan.shared, core.alive, item_keys)
        if config.split.strategy == "global_time":
            cuts = labelling.find_cuts(label_plan, facts["left"], tasks)
            label_plan = dataclasses.replace(label_plan, cuts=cuts)
        tasks.run(labelling.label, numbers, label_plan, unit=label_plan.unit, what="split buckets")
    facts["per_item"] = _distribution(core.item_counts)
    return Cleaned(core.item_counts > 0, facts["rows"], facts, label_plan)


def write(
    cleaned: Cleaned,
    *,
    item_index: Ints,
    base_user_keys: pa.Array | None = None,
    folder: Path,
    telemetry: Telemetry | None = None,
) -> Written:
    """Number the users and write ``users.parquet`` and ``interactions/*.parquet``.

    Args:
        cleaned: the log.
        item_index: (num_items,) by position in the catalogue; -1: the item is not kept.
        base_user_keys: users of the version before in user_index order: they keep their numbers,
            also without interactions now. New ones follow in the order of their first usable rows.
        folder: draft of the artifact.
        telemetry: shows the progress.

    Raises:
        UserError: an interaction is in two splits.
    """
    plan = cleaned.plan
    opened = [
        LabelledBucket.open(plan.unit(bucket)) for bucket in range(plan.buckets.log.num_buckets)
    ]
    base = pa.array([], pa.string()) if base_user_keys is None else base_user_keys
    user_index, num_users = _number_users(opened, base)
    num_rows = np.zeros(num_users, dtype=np.int64)
    for bucket, index in zip(opened, user_index, strict=True):
        num_rows[index] = np.diff(bucket.start)
    numbered = [_Numbered.of(*pair) for pair in zip(opened, user_index, strict=True)]
    show = contextlib.nullcontext() if telemetry is None else telemetry.progress(
        int(num_rows.sum()), "interactions"
    )  # fmt: skip
    with (
        show as bar,
        InteractionFiles(folder) as files,
        pq.ParquetWriter(folder / "users.parquet", schema.USERS) as users,
    ):
        for begin, end in user_ranges(num_rows):
            rows = _rows_of_range(numbered, begin, end, item_index)
            files.add(rows)
            keys = _keys_of_range(numbered, base, begin, end)
            users.write_table(pa.table([np.arange(begin, end), keys], schema=schema.USERS))
            if bar is not None:
                bar.update(len(rows))
    facts = {**cleaned.facts, "per_user": _distribution(num_rows)}
    return Written({"num_users": num_users, **files.counts}, facts)


def write_imported(rows: LabelledRows, *, num_users: int, folder: Path) -> Written:
    """Write interactions that came with their numbers and splits; a user's key is its number.

    Args:
        rows: all interactions, in any order.
        num_users: one more than the largest user_index.
        folder: draft of the artifact.

    Raises:
        UserError: an interaction is in two splits.
    """
    rows = rows.select(np.argsort(rows.user, kind="stable"))
    num_rows = np.bincount(rows.user, minlength=num_users)
    start = np.concatenate([[0], np.cumsum(num_rows)])
    with (
        InteractionFiles(folder) as files,
        pq.ParquetWriter(folder / "users.parquet", schema.USERS) as users,
    ):
        for begin, end in user_ranges(num_rows):
            files.add(rows.select(np.arange(start[begin], start[end])))
            index = pa.array(np.arange(begin, end))
            users.write_table(pa.table([index, index.cast(pa.string())], schema=schema.USERS))
    facts = {
        "left": len(rows),
        "per_user": _distribution(num_rows),
        "per_item": _distribution(np.bincount(rows.item)),
    }
    return Written({"num_users": num_users, **files.counts}, facts)


def _read(
    files: Sequence[RawFile],
    parts: Sequence[tuple[int, Piece]],
    plan: LogPlan,
    quarantine: Quarantine,
    tasks: Tasks,
) -> dict[str, Any]:
    """Scatter the log; return how many rows there are and how many of them are usable.

    Raises:
        UserError: the log is empty.
    """
    optional = (plan.columns.rating, plan.columns.timestamp)
    check_columns(
        files,
        Columns(
            log.SETTING,
            text=(plan.columns.user, plan.columns.item),
            other=tuple(name for name in optional if name is not None),
        ),
    )
    _scatter(files, parts, plan, tasks)
    facts = {"rows": 0, "usable": 0, "unknown_items_dropped": 0}
    for number, _ in parts:
        unit = plan.unit(number)
        of_piece = log.read_facts(unit)
        for name in facts:
            facts[name] += of_piece[name]
        listed = of_piece["quarantined"]
        quarantine.add_file(unit / "quarantine.parquet", {log.SOURCE: listed} if listed else {})
    if not facts["rows"]:
        raise UserError(
            f"the interaction log {', '.join(file.url for file in files)} is empty: there is "
            f"nothing to learn from. Check data_prep.interactions.path."
        )
    return facts


def _scatter(
    files: Sequence[RawFile], parts: Sequence[tuple[int, Piece]], plan: LogPlan, tasks: Tasks
) -> None:
    """Read the pieces that are not read yet: in tasks, or here, where every run of rows shows."""
    if engine.in_parallel(len(parts), tasks.config):
        tasks.run(log.scatter, parts, plan, unit=lambda part: plan.unit(part[0]), what="log pieces")
        return
    left = [part for part in parts if not plan.unit(part[0]).is_dir()]
    read = [plan.unit(number) for number, _ in parts if plan.unit(number).is_dir()]
    done = sum(log.read_facts(unit)["rows"] for unit in read)
    total = max(log.estimate_rows(files), done)
    with tasks.telemetry.progress(total, "log rows", done=done) as bar:
        for part in left:
            log.scatter(part, plan, bar.update)
        bar.total = bar.done  # now it is known


def _dropped(plan: BucketPlan, core: Core, usable: int) -> dict[str, int]:
    """Return how many rows each step dropped and how many are left.

    Raises:
        UserError: none.
    """
    rows = {"below_min_rating": 0, "repeated": 0}
    for bucket in range(plan.log.num_buckets):
        of_bucket = log.read_facts(plan.unit(bucket))
        for name in rows:
            rows[name] += of_bucket[name]
    left = int(core.item_counts.sum())
    rows |= {"outside_of_core": usable - sum(rows.values()) - left, "left": left}
    if not left:
        raise UserError(
            f"no interaction is left of {usable:,} usable ones (below min_rating "
            f"{rows['below_min_rating']:,}, repeated {rows['repeated']:,}, outside of the core "
            f"{rows['outside_of_core']:,}). Relax data_prep.interactions, and check that the log's "
            f"item keys are those of the item table."
        )
    return {**rows, "core_rounds": core.num_rounds}


def _number_users(opened: Sequence[LabelledBucket], base: pa.Array) -> tuple[list[Ints], int]:
    """Return the user_index of every user of each bucket, and the number of users in all."""
    known = []
    for bucket, rows in zip(opened, _by_bucket(base, len(opened)), strict=True):
        keys = base.take(pa.array(rows)).cast(bucket.keys.type)
        found = pc.index_in(bucket.keys, value_set=keys)
        position = pc.fill_null(found, -1).to_numpy()
        known.append(np.append(rows, -1)[position])
    is_new = [index < 0 for index in known]
    first_row = np.concatenate(
        [bucket.first_row[new] for bucket, new in zip(opened, is_new, strict=True)]
    )
    rank = np.empty(len(first_row), dtype=np.int64)
    rank[np.argsort(first_row)] = len(base) + np.arange(len(first_row))
    bounds = np.cumsum([new.sum() for new in is_new])[:-1]
    for index, new, numbers in zip(known, is_new, np.split(rank, bounds), strict=True):
        index[new] = numbers
    return known, len(base) + len(first_row)


def _by_bucket(base: pa.Array, num_buckets: int) -> list[Ints]:
    """Return the user_index of the users of the version before in each bucket, rising."""
    parts = [
        bucket_of(hash_keys(base.slice(start, _HASHED_KEYS)), num_buckets)
        for start in range(0, len(base), _HASHED_KEYS)
    ]
    bucket = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
    order = np.argsort(bucket, kind="stable")
    return np.split(order, np.cumsum(np.bincount(bucket, minlength=num_buckets))[:-1])


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """A bucket whose users have numbers.

    Attributes:
        bucket: users and their rows.
        order: (num_users,) users by rising user_index.
        user_index: (num_users,) rising.
    """

    bucket: LabelledBucket
    order: Ints
    user_index: Ints

    @classmethod
    def of(cls, bucket: LabelledBucket, user_index: Ints) -> "_Numbered":
        """Sort the users of a bucket."""
        order = np.argsort(user_index)
        return cls(bucket, order, user_index[order])

    def users(self, begin: int, end: int) -> tuple[Ints, Ints]:
        """Return number in the bucket and user_index of the users of a range."""
        low, high = np.searchsorted(self.user_index, [begin, end])
        return self.order[low:high], self.user_index[low:high]


def _rows_of_range(
    numbered: Sequence[_Numbered], begin: int, end: int, item_index: Ints
) -> LabelledRows:
    parts = []
    for source in numbered:
        users, index = source.users(begin, end)
        bucket = source.bucket
        start, num_rows = bucket.start[users], bucket.start[users + 1] - bucket.start[users]
        in_part = np.cumsum(num_rows) - num_rows
        rows = np.repeat(start - in_part, num_rows) + np.arange(num_rows.sum())
        parts.append(
            LabelledRows(
                user=np.repeat(index, num_rows),
                item=item_index[bucket.item[rows]],
                rating=bucket.rating[rows],
                time=bucket.time[rows],
                label=bucket.label[rows],
            )
        )
    joined = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in dataclasses.fields(LabelledRows)
    }
    result = LabelledRows(**joined)
    assert not len(result) or result.item.min() >= 0, "an item with interactions has no item_index"
    return result


def _keys_of_range(numbered: Sequence[_Numbered], base: pa.Array, begin: int, end: int) -> pa.Array:
    """Return the keys of the users of a range, by user_index."""
    known = units.as_strings(base.slice(begin, max(min(end, len(base)) - begin, 0)))
    keys, indices = [known], [np.arange(begin, begin + len(known))]
    for source in numbered:
        users, index = source.users(max(begin, len(base)), end)
        keys.append(source.bucket.keys.take(pa.array(users)))
        indices.append(index)
    return pa.concat_arrays(keys).take(pa.array(np.argsort(np.concatenate(indices))))


def _distribution(counts: Ints) -> dict[str, Any]:
    """Return mean, quantiles and histogram of the counts that are not 0, for the report."""
    counts = counts[counts > 0]
    quantiles = np.quantile(counts, _QUANTILES).round(1).tolist()
    edges = 2 ** np.arange(int(counts.max()).bit_length())  # 1, 2, 4, ... up to the largest
    bins = np.searchsorted(edges, counts, side="right") - 1
    return {
        "edges": edges.tolist(),
        "counts": np.bincount(bins, minlength=len(edges)).tolist(),
        "mean": round(float(counts.mean()), 2),
        "quantiles": dict(zip(map(str, _QUANTILES), quantiles, strict=True)),
    }
