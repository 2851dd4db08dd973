"""Data preparation from end to end: raw catalogue and log in, dataset artifact out.

The order is chosen so that mistakes show early: the log is read before any picture is.
"""

import contextlib
import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.data.schema import SPLITS, Split
from alignrec.stage import Context
from alignrec.telemetry import Telemetry
from alignrec.testing import synthetic
from data_prep import catalogue, engine, interactions, locations, mmrec, splits
from data_prep.config import (
    TIME_STRATEGIES,
    DataPrepConfig,
    InteractionColumns,
    ItemsConfig,
    paths_of,
)
from data_prep.images import ImageRules
from data_prep.interactions import Ints, Log
from data_prep.quarantine import Quarantine, check_budget
from data_prep.shards import ShardPlan, TextRules
from data_prep.statistics import Tally

STAGE_NAME = "data_prep"


def run(config: DataPrepConfig, context: Context) -> None:
    """Write the dataset artifact that ``config`` describes.

    Raises:
        UserError: the raw data is missing, unreadable or empty.
        StageFailure: more of it is bad than ``max_bad_fraction``.
    """
    with (
        artifacts.writing(
            context.output,
            kind="dataset",
            fingerprint=context.fingerprint,
            config=configuration.to_mapping(config),
            inputs={},
        ) as draft,
        Telemetry(context.log_dir, STAGE_NAME) as telemetry,
    ):
        quarantine = Quarantine(draft.work / "quarantine")
        preparation = _Preparation(config, context, draft, telemetry, quarantine)
        if config.source == "mmrec":
            preparation.run_mmrec()
        else:
            preparation.run_catalogue()


@dataclasses.dataclass
class _Preparation:
    """One run: its settings, its draft, and what it has put in quarantine so far."""

    config: DataPrepConfig
    context: Context
    draft: artifacts.Draft
    telemetry: Telemetry
    quarantine: Quarantine

    def run_mmrec(self) -> None:
        """Import interactions with ready splits; there are no samples."""
        data = mmrec.read(self.config.mmrec, self.quarantine)
        self._check("interactions", data.num_rows, self.config.mmrec.interactions)
        num_items = len(data.item_keys)
        nothing = pa.repeat("", num_items)
        no = pa.array(np.zeros(num_items, dtype=bool))
        items = [np.arange(num_items), data.item_keys, nothing, nothing, no, no, no]
        pq.write_table(pa.table(items, schema=schema.ITEMS), self.draft.path / "items.parquet")
        pq.write_table(schema.SAMPLES.empty_table(), self.draft.path / "samples.parquet")
        user_keys = pa.array(np.arange(data.num_users)).cast(pa.string())
        self._write_interactions(data.log, data.labels, user_keys)
        self.draft.facts["interactions"] |= {"rows": data.num_rows, "left": len(data.log)}
        self._finish(Tally(samples=0), num_items=num_items, num_shards=0)
        self.telemetry.say(
            f"imported {num_items:,} items, {data.num_users:,} users, "
            f"{len(data.log):,} interactions with their split"
        )

    def run_catalogue(self) -> None:
        """Prepare items, pictures, texts and interactions."""
        config = self._with_raw_files()
        item_files = locations.find(paths_of(config.items.path))
        keys = catalogue.read_keys(item_files, config.items.columns, self.quarantine)
        self._check("items", keys.num_rows + keys.num_malformed, item_files[0].url)
        kept_items = self._prepare_interactions(config, keys.good)
        is_item = _rows_of(keys.is_good, kept_items)
        plan = self._shard_plan(config)
        num_chunks = catalogue.write_chunks(
            item_files,
            config.items.columns,
            is_item=is_item,
            folder=plan.chunk_path(0).parent,
            max_rows=config.shards.max_samples,
        )
        tally = self._make_shards(plan, num_chunks, int(is_item.sum()))
        self._collect_bad_pictures(plan, num_chunks)
        self._check("images", tally.images_declared, plan.images.root)
        self._join_parts(plan, num_chunks)
        self._finish(tally, num_items=int(is_item.sum()), num_shards=num_chunks)

    def _with_raw_files(self) -> DataPrepConfig:
        """Return the configuration with raw files to read; a synthetic catalogue is drawn first."""
        config = self.config
        if config.source != "synthetic":
            return config
        folder = self.draft.work / "synthetic"
        mark = folder / "done.json"
        if not mark.exists():
            sizes = dataclasses.asdict(config.synthetic)
            self.telemetry.say(f"drawing a catalogue of {config.synthetic.num_items:,} items")
            synthetic.write_catalogue(folder, **sizes)
            artifacts.write_json(mark, sizes)
        columns = InteractionColumns(timestamp="timestamp")
        return dataclasses.replace(
            config,
            source="table",
            synthetic=type(config.synthetic)(),
            items=ItemsConfig(path=str(folder / "items.parquet"), keep=config.items.keep),
            interactions=dataclasses.replace(
                config.interactions,
                path=str(folder / "interactions.parquet"),
                columns=columns,
            ),
        )

    def _prepare_interactions(
        self, config: DataPrepConfig, item_keys: pa.Array
    ) -> npt.NDArray[np.bool_]:
        """Write users and interactions; return which items of the catalogue stay."""
        files = locations.find(paths_of(config.interactions.path))
        raw = interactions.read_log(files, config.interactions.columns, self.quarantine)
        log, user_keys = interactions.encode(
            raw,
            item_keys,
            self.quarantine,
            need_timestamps=config.split.strategy in TIME_STRATEGIES,
        )
        num_rows = len(raw) + raw.num_malformed
        self._check("interactions", num_rows, files[0].url)
        del raw
        log, dropped = interactions.clean(log, config.interactions)
        user, old_users = interactions.renumber(log.user, len(user_keys))
        item, kept_items = self._renumbered_items(config.items, log.item, len(item_keys))
        log = dataclasses.replace(log, user=user, item=item)
        self._write_interactions(log, splits.split(log, config.split), user_keys.take(old_users))
        self.draft.facts["interactions"] |= {"rows": num_rows, **dropped}
        self.telemetry.say(
            f"{num_rows:,} rows of the log: {len(log):,} interactions of "
            f"{len(old_users):,} users with {int(kept_items.sum()):,} items"
        )
        return kept_items

    @staticmethod
    def _renumbered_items(
        config: ItemsConfig, item: Ints, num_items: int
    ) -> tuple[Ints, npt.NDArray[np.bool_]]:
        if config.keep == "all":
            return item, np.ones(num_items, dtype=bool)
        renumbered, old = interactions.renumber(item, num_items)
        kept = np.zeros(num_items, dtype=bool)
        kept[old] = True
        return renumbered, kept

    def _write_interactions(self, log: Log, labels: splits.Labels, user_keys: pa.Array) -> None:
        folder = self.draft.path / "interactions"
        folder.mkdir(exist_ok=True)
        pairs: dict[Split, tuple[Ints, Ints]] = {}
        for label, split in enumerate(SPLITS):
            part = log.select(labels == label)
            part = part.select(np.lexsort((part.item, part.user)))
            pairs[split] = (part.user, part.item)
            pq.write_table(_interaction_table(part), folder / f"{split}.parquet")
            self.draft.counts[f"num_{split}"] = len(part)
        splits.check_leakage(pairs)
        users = pa.table([np.arange(len(user_keys)), user_keys], schema=schema.USERS)
        pq.write_table(users, self.draft.path / "users.parquet")
        self.draft.counts["num_users"] = len(user_keys)
        self.draft.facts["interactions"] = dict(interactions.statistics(log))

    def _shard_plan(self, config: DataPrepConfig) -> ShardPlan:
        rules = config.images
        root = rules.root or locations.folder_of(paths_of(config.items.path)[0])
        return ShardPlan(
            artifact=self.draft.path.absolute(),
            work=self.draft.work.absolute(),
            images=ImageRules.of(rules, root=locations.absolute(root)),
            text=TextRules(**dataclasses.asdict(config.text)),
            read_threads=rules.read_threads,
        )

    def _make_shards(self, plan: ShardPlan, num_chunks: int, num_items: int) -> Tally:
        """Run the shard tasks that are not done; return the statistics of all shards."""
        done = [chunk for chunk in range(num_chunks) if plan.is_done(chunk)]
        left = [chunk for chunk in range(num_chunks) if not plan.is_done(chunk)]
        if done:
            self.telemetry.say(f"resuming: {len(done)} of {num_chunks} shards are done")
        summaries = [plan.read_done(chunk)["summary"] for chunk in done]
        num_done = sum(summary["num_items"] for summary in summaries)
        num_bad = sum(summary["num_bad_images"] for summary in summaries)
        session = engine.session(self.config) if left else contextlib.nullcontext()
        with session, self.telemetry.progress(num_items, "items", done=num_done) as bar:

            def finished(summary: dict[str, Any]) -> None:
                nonlocal num_bad
                num_bad += summary["num_bad_images"]
                bar.update(summary["num_items"], note=f"{num_bad:,} bad pictures")
                # Already too many for the whole catalogue: hours more would not change that.
                if num_bad > self.config.max_bad_fraction * num_items:
                    self._collect_bad_pictures(plan, num_chunks)
                    self._check("images", bar.done, plan.images.root)

            if left:
                engine.run_shards(plan, left, num_cpus=self.config.num_cpus, finished=finished)
        tally = Tally()
        for chunk in range(num_chunks):
            tally.merge(plan.read_done(chunk)["tally"])
        return tally

    def _join_parts(self, plan: ShardPlan, num_chunks: int) -> None:
        """Join the shards' tables in item_index order."""
        for name, kind in (("items", schema.ITEMS), ("samples", schema.SAMPLES)):
            with pq.ParquetWriter(self.draft.path / f"{name}.parquet", kind) as writer:
                for chunk in range(num_chunks):
                    writer.write_table(pq.read_table(plan.part_path(chunk, name), schema=kind))

    def _collect_bad_pictures(self, plan: ShardPlan, num_chunks: int) -> None:
        for chunk in filter(plan.is_done, range(num_chunks)):
            self.quarantine.add_file(plan.part_path(chunk, "quarantine"))

    def _check(self, source: str, total: int, location: str) -> None:
        """Fail when too much of a source is bad, with the list where it outlives the run."""
        counts = self.quarantine.reasons().get(source, {})
        if not counts:
            return
        listed_in = self.context.log_dir / "quarantine.parquet"
        self.quarantine.write(listed_in)
        check_budget(
            f"{source} of {location}",
            counts,
            total,
            max_fraction=self.config.max_bad_fraction,
            listed_in=listed_in,
        )

    def _finish(self, tally: Tally, *, num_items: int, num_shards: int) -> None:
        self.quarantine.write(self.draft.path / "quarantine.parquet")
        reasons = self.quarantine.reasons()
        has_text = pq.read_table(self.draft.path / "items.parquet", columns=["has_text"])
        self.draft.counts |= {
            "num_items": num_items,
            "num_shards": num_shards,
            "num_without_image": num_items - tally.images,
            "num_without_text": num_items - int(np.sum(has_text["has_text"].to_numpy())),
            "num_quarantined": sum(sum(counts.values()) for counts in reasons.values()),
        }
        self.draft.facts |= {**tally.facts(), "quarantine": reasons}
        for source, counts in reasons.items():
            listed = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
            self.telemetry.say(f"quarantine, {source}: {listed}")


def _rows_of(is_good: npt.NDArray[np.bool_], kept: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Return the rows of the item table that hold the kept ones of its good items."""
    rows = np.zeros_like(is_good)
    rows[np.flatnonzero(is_good)[kept]] = True
    return rows


def _interaction_table(log: Log) -> pa.Table:
    columns = [
        log.user,
        log.item,
        pa.array(log.rating, mask=np.isnan(log.rating)),
        pa.array(log.timestamp, mask=~log.has_timestamp),
    ]
    return pa.table(columns, schema=schema.INTERACTIONS)
