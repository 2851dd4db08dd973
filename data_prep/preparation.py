"""Data preparation from end to end: raw catalogue and log in, dataset artifact out.

The order is chosen so that mistakes show early: the log is read before any picture is.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.errors import StageFailure
from alignrec.stage import Context, storage_failures
from alignrec.telemetry import Telemetry
from alignrec.testing import synthetic
from data_prep import catalogue, interactions, locations, mmrec, packing, versions
from data_prep.catalogue import Ints, Numbering
from data_prep.config import (
    DataPrepConfig,
    InteractionColumns,
    ItemsConfig,
    paths_of,
)
from data_prep.images import ImageRules
from data_prep.packing import Packed
from data_prep.pictures import PictureRules
from data_prep.quarantine import Quarantine, check_budget
from data_prep.shards import ShardPlan, TextRules
from data_prep.statistics import Tally

STAGE_NAME = "data_prep"


def run(config: DataPrepConfig, context: Context) -> None:
    """Write the dataset artifact that ``config`` describes.

    Raises:
        UserError: the raw data is missing, unreadable or empty.
        StageFailure: more of it is bad than ``max_bad_fraction``, more items are gone than
            ``versions.max_removed_fraction``, it changed meanwhile, or the storage is full.
    """
    sources = config.source_identity()
    with (
        storage_failures(context.output),
        Telemetry(context.log_dir, STAGE_NAME) as telemetry,
        _writing(config, context, telemetry) as (draft, base),
    ):
        quarantine = Quarantine(draft.work / "quarantine")
        preparation = _Preparation(config, context, draft, telemetry, quarantine, base)
        if config.source == "mmrec":
            preparation.run_mmrec()
        else:
            preparation.run_catalogue()
        if config.source_identity() != sources:
            raise catalogue.changed("the item table or the log")


@contextlib.contextmanager
def _writing(
    config: DataPrepConfig, context: Context, telemetry: Telemetry
) -> Iterator[tuple[artifacts.Draft, Path | None]]:
    """Give a draft of the dataset, and the version that it continues; publish it at the end."""
    resolved = configuration.to_mapping(config)
    if config.versions.root is None:
        with artifacts.writing(
            context.output,
            kind="dataset",
            fingerprint=context.fingerprint,
            config=resolved,
            inputs={},
        ) as draft:
            yield draft, None
        return
    with versions.writing(
        Path(locations.absolute(config.versions.root)),
        context.output,
        keep=config.versions.keep,
        kind="dataset",
        fingerprint=context.fingerprint,
        config=resolved,
        run=os.environ.get("ALIGNREC_RUN") or str(context.output.absolute()),
        say=telemetry.say,
    ) as growing:
        base = growing.base
        growing.draft.facts["version"] = {
            "number": growing.number,
            "base": None if base is None else base.name,
        }
        yield growing.draft, base


@dataclasses.dataclass
class _Preparation:
    """One run: its settings, its draft, and what it has put in quarantine so far.

    Attributes:
        base: the version before, whose numbers, shards and pictures stay; None without one.
    """

    config: DataPrepConfig
    context: Context
    draft: artifacts.Draft
    telemetry: Telemetry
    quarantine: Quarantine
    base: Path | None

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
        written = interactions.write_imported(
            data.rows, num_users=data.num_users, folder=self.draft.path
        )
        self.draft.counts |= written.counts
        self.draft.facts["interactions"] = {"rows": data.num_rows, **written.facts}
        self._finish(Tally(samples=0), num_items=num_items, num_removed=0, num_shards=0)
        self.telemetry.say(
            f"imported {num_items:,} items, {data.num_users:,} users, "
            f"{len(data.rows):,} interactions with their split"
        )

    def run_catalogue(self) -> None:
        """Prepare items, pictures, texts and interactions."""
        config = self._with_raw_files()
        item_files = config.item_files()
        keys = catalogue.read_keys(item_files, config.items.columns, self.quarantine)
        self._check("items", keys.num_rows + keys.num_malformed, item_files[0].url)
        numbering = catalogue.Numbering.of(keys.good, self._earlier_keys("items", "item_key"))
        numbers = self._prepare_interactions(config, keys.good, numbering)
        removed = numbering.removed(numbers)
        self._check_removed(removed)
        num_items = int((numbers >= 0).sum()) + len(removed)
        plan = self._shard_plan(config)
        num_chunks = catalogue.write_chunks(
            item_files,
            config.items.columns,
            keys=keys,
            numbers=_numbers_of_rows(keys.is_good, numbers),
            removed=removed,
            folder=plan.chunk_path(0).parent,
            max_rows=config.shards.max_samples,
        )
        packed = self._make_shards(plan, num_chunks, num_items)
        packing.list_bad_pictures(plan, packed.chunks, self.quarantine)
        self._check("images", packed.tally.images_declared, plan.pictures.images.root)
        packing.join_tables(plan, packed.chunks, self.draft)
        self._finish(
            packed.tally,
            num_items=num_items,
            num_removed=len(removed),
            num_shards=packed.num_shards,
        )
        if self.base is not None:
            self._tell_what_changed(packed, num_new=int((numbers >= len(numbering.earlier)).sum()))

    def _earlier_keys(self, table: str, column: str) -> pa.Array | None:
        """Return the keys of the version before, in the order of their numbers."""
        if self.base is None:
            return None
        keys = schema.read_table(self.base / f"{table}.parquet", columns=[column])[column]
        return keys.cast(pa.large_string()).combine_chunks()  # may have more than 2 GiB

    def _check_removed(self, removed: pa.Table) -> None:
        """Fail when so many items of the version before are gone that a table may be cut off."""
        if self.base is None:
            return
        table = schema.read_table(self.base / "items.parquet", columns=["removed"])
        was_there = ~table["removed"].to_numpy()  # (num_items,)
        num_before = int(was_there.sum())
        num_gone = int(was_there[removed["item_index"].to_numpy()].sum())
        limit = self.config.versions.max_removed_fraction
        if num_gone > limit * num_before:
            raise StageFailure(
                f"{num_gone:,} of the {num_before:,} items of version {self.base.name} are gone, "
                f"above data_prep.versions.max_removed_fraction={limit}: a table or log that was "
                f"cut off looks like this, and they would not be recommended any more. Nothing was "
                f"published. Correct the tables, or raise the limit if the items are meant to go, "
                f"and run the same command again."
            )

    def _tell_what_changed(self, packed: Packed, *, num_new: int) -> None:
        assert self.base is not None
        self.draft.facts["version"] |= {
            "new_items": num_new,
            "linked_shards": packed.num_linked,
            "kept_pictures": packed.num_kept,
            "fetched_pictures": packed.num_fetched,
        }
        self.telemetry.say(
            f"since version {self.base.name}: {num_new:,} new items, "
            f"{packed.num_linked:,} of {len(packed.chunks):,} shards unchanged; in the others "
            f"{packed.num_kept:,} pictures kept and {packed.num_fetched:,} fetched"
        )

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
        self, config: DataPrepConfig, item_keys: pa.Array, numbering: Numbering
    ) -> Ints:
        """Write users and interactions; return the item_index of each key, -1 if it goes."""
        files = config.interaction_files()
        cleaned = interactions.clean(
            files,
            config,
            item_keys,
            quarantine=self.quarantine,
            work=self.draft.work,
            telemetry=self.telemetry,
            check=lambda num_rows: self._check("interactions", num_rows, files[0].url),
        )
        kept = cleaned.interacted | (config.items.keep == "all")
        numbers = numbering.assign(kept)
        written = interactions.write(
            cleaned,
            item_index=numbers,
            base_user_keys=self._earlier_keys("users", "user_key"),
            folder=self.draft.path,
            telemetry=self.telemetry,
        )
        self.draft.counts |= written.counts
        self.draft.facts["interactions"] = written.facts
        self.telemetry.say(
            f"{cleaned.num_rows:,} rows of the log: {written.facts['left']:,} interactions of "
            f"{written.counts['num_users']:,} users with {int(kept.sum()):,} items"
        )
        return numbers

    def _shard_plan(self, config: DataPrepConfig) -> ShardPlan:
        rules = config.images
        root = rules.root or locations.folder_of(paths_of(config.items.path)[0])
        return ShardPlan(
            artifact=self.draft.path.absolute(),
            work=self.draft.work.absolute(),
            pictures=PictureRules(
                images=ImageRules.of(rules, root=locations.absolute(root)),
                revision=rules.revision,
                read_threads=rules.read_threads,
            ),
            text=TextRules(**dataclasses.asdict(config.text)),
            base=self.base,
        )

    def _make_shards(self, plan: ShardPlan, num_chunks: int, num_items: int) -> Packed:
        def check(num_bad: int, num_done: int) -> None:
            # Already too many for the whole catalogue: hours more would not change that.
            if num_bad > self.config.max_bad_fraction * num_items:
                done = packing.finished_chunks(plan, num_chunks)
                packing.list_bad_pictures(plan, done, self.quarantine)
                self._check("images", num_done, plan.pictures.images.root)

        return packing.make_shards(
            plan,
            num_chunks,
            num_items=num_items,
            config=self.config,
            telemetry=self.telemetry,
            check=check,
        )

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

    def _finish(self, tally: Tally, *, num_items: int, num_removed: int, num_shards: int) -> None:
        self.quarantine.write(self.draft.path / "quarantine.parquet")
        reasons = self.quarantine.reasons()
        has_text = pq.read_table(self.draft.path / "items.parquet", columns=["has_text"])
        self.draft.counts |= {
            "num_items": num_items,
            "num_removed": num_removed,
            "num_shards": num_shards,
            "num_without_image": num_items - num_removed - tally.images,
            "num_without_text": num_items
            - num_removed
            - int(np.sum(has_text["has_text"].to_numpy())),
            "num_quarantined": sum(sum(counts.values()) for counts in reasons.values()),
        }
        self.draft.facts |= {**tally.facts(), "quarantine": reasons}
        for source, counts in reasons.items():
            listed = ", ".join(f"{reason} {count:,}" for reason, count in counts.items())
            self.telemetry.say(f"quarantine, {source}: {listed}")


def _numbers_of_rows(is_good: npt.NDArray[np.bool_], numbers: Ints) -> Ints:
    """Return the item_index of each row of the item table, -1 for rows that do not stay."""
    rows = np.full(len(is_good), -1, dtype=np.int64)
    rows[is_good] = numbers
    return rows
