"""Chunks of the catalogue in, shards and joined tables out (preparation -> artifact)."""

import dataclasses
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.artifacts import Draft
from alignrec.telemetry import Progress, Telemetry
from data_prep import engine
from data_prep.config import DataPrepConfig
from data_prep.quarantine import Quarantine, column_table
from data_prep.reuse import CHUNKS, Chunk
from data_prep.shards import TABLES, ShardPlan, may_become_better, take_back, write_shard
from data_prep.statistics import Tally
from data_prep.tars import SHARDS

# A night in which little changed is done in less time than Ray takes to start.
_ALONE_SECONDS = 10.0


@dataclasses.dataclass(frozen=True)
class Packed:
    """What came of the chunks.

    Attributes:
        chunks: all of them, in order.
        tally: statistics of all samples.
        num_linked: chunks whose shard is that of the version before.
        num_kept: pictures in other chunks that the version before, or a stopped run, had.
        num_fetched: pictures that were read and prepared.
    """

    chunks: list[Chunk]
    tally: Tally
    num_linked: int
    num_kept: int
    num_fetched: int

    @property
    def num_shards(self) -> int:
        """Shards of the dataset; a chunk of removed items has none."""
        return sum(bool(chunk.shard) for chunk in self.chunks)


def make_shards(
    plan: ShardPlan,
    num_chunks: int,
    *,
    num_items: int,
    config: DataPrepConfig,
    telemetry: Telemetry,
    check: Callable[[int, int], None],
) -> Packed:
    """Make the shards that are not done, and those with bad pictures that may be good by now.

    Args:
        plan: what the tasks share.
        num_chunks: chunks of the catalogue.
        num_items: items of the catalogue, removed ones included.
        config: how Ray is used.
        telemetry: shows the progress.
        check: called with the numbers of bad pictures and of finished items after every shard;
            raises when hours more would be wasted.
    """
    _take_back_bad(plan, num_chunks, telemetry)
    done = [chunk for chunk in range(num_chunks) if plan.is_done(chunk)]
    left = [chunk for chunk in range(num_chunks) if not plan.is_done(chunk)]
    if done:
        telemetry.say(f"resuming: {len(done)} of {num_chunks} shards are done")
    summaries = [plan.read_done(chunk)[1] for chunk in done]
    num_done = sum(summary["num_items"] for summary in summaries)
    with telemetry.progress(num_items, "items", done=num_done) as bar:
        watch = _Watch(telemetry, bar, check)
        watch.num_bad = sum(summary["num_bad_images"] for summary in summaries)
        if plan.base is not None:
            left = _make_alone(plan, left, watch.finished)
        if left:
            with engine.session(config):
                engine.run_shards(plan, left, num_cpus=config.num_cpus, finished=watch.finished)
    finished = [plan.read_done(chunk) for chunk in range(num_chunks)]
    tally = Tally()
    for chunk, _ in finished:
        tally.merge(chunk.read_tally())
    return Packed(
        chunks=[chunk for chunk, _ in finished],
        tally=tally,
        num_linked=sum(summary["linked"] for _, summary in finished),
        num_kept=sum(summary["kept"] for _, summary in finished),
        num_fetched=sum(summary["fetched"] for _, summary in finished),
    )


def join_tables(plan: ShardPlan, chunks: Iterable[Chunk], draft: Draft) -> None:
    """Write the tables of all chunks in item_index order, a row group a chunk.

    Shards of attempts that came out differently are dropped: they are no part of the dataset.
    """
    listed = list(chunks)
    named = {chunk.shard for chunk in listed}
    for path in (draft.path / SHARDS).glob("*.tar"):
        if f"{SHARDS}/{path.name}" not in named:
            path.unlink()
    for name, kind in TABLES.items():
        with pq.ParquetWriter(draft.path / f"{name}.parquet", kind) as writer:
            for chunk in listed:
                part = plan.read_part(chunk, name)
                if len(part):
                    writer.write_table(part, row_group_size=len(part))
    draft.provenance |= {"pictures.parquet", "chunks.parquet"}
    rows = [dataclasses.asdict(chunk) for chunk in listed]
    pq.write_table(pa.Table.from_pylist(rows, CHUNKS), draft.path / "chunks.parquet")
    draft.checksums |= {
        chunk.shard: {"bytes": chunk.bytes, "sha256": chunk.sha256}
        for chunk in listed
        if chunk.shard
    }


def list_bad_pictures(plan: ShardPlan, chunks: Iterable[Chunk], quarantine: Quarantine) -> None:
    """Put the bad pictures of finished chunks into quarantine."""
    for chunk in chunks:
        if not chunk.num_bad_images:
            continue
        pictures = plan.read_part(chunk, "pictures")
        bad = pictures.filter(pc.not_equal(pictures["reason"], ""))
        keys = plan.read_part(chunk, "items")["item_key"]
        of_bad = keys.take(pc.subtract(bad["item_index"], chunk.first_item))
        quarantine.add_table(column_table("images", of_bad, bad["reason"], bad["detail"]))


def finished_chunks(plan: ShardPlan, num_chunks: int) -> list[Chunk]:
    """Return the chunks that are done so far."""
    return [plan.read_done(chunk)[0] for chunk in range(num_chunks) if plan.is_done(chunk)]


def _take_back_bad(plan: ShardPlan, num_chunks: int, telemetry: Telemetry) -> None:
    """Have chunks made again whose bad pictures may be good by now: an outage may be over."""
    finished = [chunk for chunk in range(num_chunks) if plan.is_done(chunk)]
    better = [chunk for chunk in finished if may_become_better(chunk, plan)]
    for chunk in better:
        take_back(chunk, plan)
    if better:
        telemetry.say(f"bad pictures of {len(better)} finished shards are tried again")


class _Watch:
    """Counts what finished shards report, for the terminal and the dashboard."""

    def __init__(
        self, telemetry: Telemetry, bar: Progress, check: Callable[[int, int], None]
    ) -> None:
        self.num_bad = 0
        self._telemetry = telemetry
        self._bar = bar
        self._check = check
        self._bad: Counter[str] = Counter()
        self._bytes = 0
        self._start = time.monotonic()

    def finished(self, summary: dict[str, Any]) -> None:
        self.num_bad += summary["num_bad_images"]
        self._bad.update(summary["bad"])
        self._bytes += summary["bytes"]
        for shard in summary["damaged"]:
            self._telemetry.say(
                f"{shard} of the version before is damaged: its pictures are fetched again"
            )
        self._bar.update(summary["num_items"], note=f"{self.num_bad:,} bad pictures")
        seconds = max(time.monotonic() - self._start, 1e-9)
        self._telemetry.gauge("bytes_per_second", self._bytes / seconds)
        for reason, count in self._bad.items():
            self._telemetry.gauge("bad_items", count, reason=reason)
        self._check(self.num_bad, self._bar.done)


def _make_alone(
    plan: ShardPlan, chunks: list[int], finished: Callable[[dict[str, Any]], None]
) -> list[int]:
    """Make shards in this process for some seconds; return those that are left."""
    end = time.monotonic() + _ALONE_SECONDS
    for position, chunk in enumerate(chunks):
        if time.monotonic() > end:
            return chunks[position:]
        finished(write_shard({"chunk": chunk}, plan))
    return []
