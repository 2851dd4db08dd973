"""One content feature per item (dataset, encoder -> features).

Batches are fixed ranges of items and ranks take contiguous ranges of batches, so rows do not depend
on the number of ranks; batches that are done are marked, so a killed run goes on.
"""

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.data.loader import ItemBatch, ItemReader, Loader, MicroBatch
from alignrec.data.order import permutation_key, permute
from alignrec.data.shards import SampleTable, ShardReader, open_shards
from alignrec.data.shared_array import SharedArray, create_array
from alignrec.distributed.host_memory import freed_memory_kept
from alignrec.distributed.peers import lost_peers_reported
from alignrec.distributed.process_group import (
    Rank,
    barrier,
    process_group,
    rank_from_environment,
)
from alignrec.distributed.watchdog import Beat, Watchdog, unwatched
from alignrec.errors import StageFailure, UserError
from alignrec.features import rows
from alignrec.features.config import ExtractionConfig, FeaturesConfig
from alignrec.features.importing import write_imported
from alignrec.pretrain.encoder import ContentEncoder, FeaturePart, load_encoder
from alignrec.pretrain.tokenizer import TOKENIZER, load_words
from alignrec.stage import Context
from alignrec.telemetry import Telemetry

_RAW = "raw.npy"
_HIDE_STREAM = 5  # stream number of the hiding permutation
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 5.0  # seconds between looks at what other ranks have done


def run(config: FeaturesConfig, context: Context) -> None:
    """Extract or import on this rank; rank 0 writes the artifact."""
    rank = rank_from_environment()
    _check_sources(config, context)
    with Telemetry(context.log_dir, "features", enabled=rank.is_first) as telemetry:
        telemetry.rewind(0)
        with (
            process_group(timeout_seconds=config.timeout_seconds),
            freed_memory_kept(),
            lost_peers_reported(rank, doing="extracting features"),
            Watchdog(
                rank, context.log_dir, seconds=config.watchdog_seconds, doing="extracting features"
            ) as watchdog,
        ):
            if rank.is_first:
                artifacts.open_draft(context.output, fingerprint=context.fingerprint)
            barrier(rank)
            draft = artifacts.Draft(artifacts.partial_path(context.output))
            files = None
            if not config.files:
                files = _extract(config, context, draft, rank, telemetry, watchdog)
        if rank.is_first:  # the peers do not wait: this may take longer than the timeout
            _write_artifact(files, config, context, draft, telemetry)


def _check_sources(config: FeaturesConfig, context: Context) -> None:
    if config.files and config.extraction != ExtractionConfig():
        raise UserError(
            "features.extraction has no effect when features.files are imported. Leave one of the "
            "two out."
        )
    if not config.files and "encoder" not in context.inputs:
        raise UserError(
            "features need either an encoder (a pretrain section in the recipe, or --encoder) or "
            "features.files to import. Give one of them."
        )


def _write_artifact(
    files: "_WorkFiles | None",
    config: FeaturesConfig,
    context: Context,
    draft: artifacts.Draft,
    telemetry: Telemetry,
) -> None:
    """Write and publish the features of the work files, or imported ones without any."""
    dataset = context.inputs["dataset"]
    num_items = artifacts.read(dataset).counts["num_items"]
    if files is None:
        dim = write_imported(config.files, draft.path, num_items=num_items, dtype=config.dtype)
    else:
        dim = _write_final(files, content_mask(dataset, config.extraction), config, draft.path)
    draft.counts |= {"num_items": num_items, "dim": dim}
    draft.facts["source"] = "files" if config.files else "encoder"
    if files is not None:
        draft.facts["parts"] = [dataclasses.asdict(part) for part in files.parts]
    telemetry.say(f"{num_items:,} rows of {dim} numbers")
    artifacts.publish(
        draft,
        context.output,
        kind="features",
        fingerprint=context.fingerprint,
        config=configuration.to_mapping(config),
        inputs=context.inputs,
    )


def _extract(
    config: FeaturesConfig,
    context: Context,
    draft: artifacts.Draft,
    rank: Rank,
    telemetry: Telemetry,
    watchdog: Watchdog,
) -> "_WorkFiles":
    """Encode all items, every rank its share."""
    dataset = context.inputs["dataset"]
    encoder = load_encoder(context.inputs["encoder"]).to(rank.device)
    table = SampleTable.read(dataset)
    mask = content_mask(dataset, config.extraction)
    parts = encoder.feature_parts(config.extraction.pooling)
    files = _WorkFiles.open(draft, parts, len(mask), -(-len(table) // config.batch_size), config)
    if rank.is_first:
        files.create()
    barrier(rank)
    worker = _Worker(encoder, mask, config, rank, telemetry, watchdog.alive)
    near = open_shards(dataset, table, config.shards, num_readers=rank.local_world_size)
    with contextlib.closing(near) as shards:
        worker.encode_range(files, _item_reader(context, encoder, shards), shards, table)
    watchdog.beat()  # who is behind the others has not come here
    if rank.world_size > 1:
        files.wait(seconds=config.timeout_seconds, alive=watchdog.alive)
    barrier(rank)
    return files


def content_mask(dataset: Path, config: ExtractionConfig) -> npt.NDArray[np.bool_]:
    """Return (num_items, 2) bool: whether the item's image, text is there and not hidden.

    A removed item has no sample, so neither, whatever its row in the item table still says.
    """
    items = schema.read_items(dataset, columns=["has_image", "has_text"])
    mask = np.stack([items["has_image"].to_numpy(), items["has_text"].to_numpy()], axis=1)
    mask = mask.astype(bool)
    mask[schema.read_removed_items(dataset)] = False
    if config.hide != "nothing":
        position = permute(
            np.arange(len(mask)), len(mask), permutation_key(config.hide_seed, _HIDE_STREAM)
        )
        hidden = position < round(config.hide_fraction * len(mask))
        mask[hidden, 0 if config.hide == "image" else 1] = False
    return mask


@dataclasses.dataclass(frozen=True)
class _WorkFiles:
    """The encoder's rows before centring, and which batches are in them."""

    raw: Path
    done: Path
    parts: list[FeaturePart]
    num_items: int
    num_batches: int

    @classmethod
    def open(
        cls,
        draft: artifacts.Draft,
        parts: list[FeaturePart],
        num_items: int,
        num_batches: int,
        config: FeaturesConfig,
    ) -> "_WorkFiles":
        done = draft.work / f"done_{config.batch_size}.npy"
        return cls(draft.work / _RAW, done, parts, num_items, num_batches)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.num_items, sum(part.width for part in self.parts)

    def create(self) -> None:
        """Make the files unless a killed run has left them; the marks come last, and whole."""
        if not self.done.exists():
            for stale in self.done.parent.glob("done_*"):  # of another batch size
                stale.unlink()
            create_array(self.raw, np.float32, self.shape)
            spare = self.done.with_suffix(".writing")
            create_array(spare, np.bool_, (self.num_batches,))
            spare.replace(self.done)

    def wait(self, *, seconds: float, alive: Beat = unwatched) -> None:
        """Wait for batches of other ranks as long as some come: a slower host is no lost peer.

        Args:
            seconds: to wait when none comes.
            alive: called when some came.
        """
        pause, last, num_left = _FIRST_PAUSE, time.monotonic(), self.num_left()
        while num_left and time.monotonic() - last < seconds:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            if (now_left := self.num_left()) < num_left:
                num_left, last = now_left, time.monotonic()
                alive()

    def num_left(self) -> int:
        """Return how many batches are not marked."""
        return int((~np.load(self.done)).sum())


def _item_reader(context: Context, encoder: ContentEncoder, shards: ShardReader) -> ItemReader:
    architecture = encoder.architecture
    words = load_words(
        context.inputs["encoder"] / TOKENIZER, max_length=architecture.max_text_tokens
    )
    return ItemReader(
        shards,
        words.batch,
        image_size=architecture.image_size,
        padding_id=words.padding_id,
    )


@dataclasses.dataclass(frozen=True)
class _Worker:
    """Encodes this rank's range of batches."""

    encoder: ContentEncoder
    mask: npt.NDArray[np.bool_]
    config: FeaturesConfig
    rank: Rank
    telemetry: Telemetry
    alive: Beat = unwatched

    def encode_range(
        self, files: _WorkFiles, reader: ItemReader, shards: ShardReader, table: SampleTable
    ) -> None:
        """Fill in the batches that are not done yet."""
        index, size = self.rank.index, self.rank.world_size
        mine = range(files.num_batches * index // size, files.num_batches * (index + 1) // size)
        done = np.load(files.done)
        left = [number for number in mine if not done[number]]
        loader = Loader(reader.read, num_threads=self.config.num_threads)
        planned = (MicroBatch(0, np.arange(*self._rows(number, table))) for number in left)
        batches = shards.fetched_ahead(planned, lambda batch: batch.rows)
        total, missing = (
            sum(end - first for first, end in (self._rows(number, table) for number in numbers))
            for numbers in (mine, left)
        )
        with (
            SharedArray.open(files.done) as marks,
            SharedArray.open(files.raw) as raw,
            contextlib.closing(loader.batches(batches)) as stream,
            self.telemetry.progress(total, "items", done=total - missing) as progress,
        ):
            for number, batch in zip(left, stream, strict=True):
                _write_rows(raw, batch.item_index, self.encode(batch))
                raw.sync()  # a mark must not reach storage before the rows
                marks.write(number, np.ones(1, dtype=np.bool_))
                marks.flush()
                progress.update(len(batch.item_index))
                self.alive()

    def _rows(self, number: int, table: SampleTable) -> tuple[int, int]:
        """Return the first row of a batch and the one after its last, which may be short."""
        size = self.config.batch_size
        return number * size, min((number + 1) * size, len(table))

    @torch.no_grad()
    def encode(self, batch: ItemBatch) -> npt.NDArray[np.float32]:
        """Return the features of a batch; an item with neither modality gets zeros."""
        seen = self.mask[batch.item_index]
        chosen = self.config.extraction
        is_bf16 = chosen.precision == "bf16"
        with torch.autocast(self.rank.device.type, torch.bfloat16, enabled=is_bf16):
            pooled = self.encoder.features(
                self._near(batch.images),
                self._near(batch.has_image & seen[:, 0]),
                self._near(batch.tokens),
                self._near(batch.text_padding | ~seen[:, 1:]),
                pooling=chosen.pooling,
            )
        result: npt.NDArray[np.float32] = pooled.float().cpu().numpy() * seen.any(
            axis=1, keepdims=True
        )
        return result

    def _near(self, array: npt.NDArray[Any]) -> torch.Tensor:
        """Put an array on this rank's device; a GPU copies it while the host goes on."""
        tensor = torch.from_numpy(array)
        if self.rank.device.type == "cuda":
            tensor = tensor.pin_memory()
        return tensor.to(self.rank.device, non_blocking=True)


def _write_rows(
    raw: SharedArray, index: npt.NDArray[np.int64], features: npt.NDArray[np.float32]
) -> None:
    """Write the rows of ascending items; removed items leave gaps, which stay zero."""
    for run in np.split(np.arange(len(index)), np.flatnonzero(np.diff(index) != 1) + 1):
        raw.write(int(index[run[0]]), features[run])


def _write_final(
    files: _WorkFiles, mask: npt.NDArray[np.bool_], config: FeaturesConfig, folder: Path
) -> int:
    """Centre, whiten and scale the raw rows into the artifact; returns the number of columns."""
    if left := files.num_left():
        raise StageFailure(
            f"{left} of {files.num_batches} batches of features never reached {files.done}, so "
            f"their rows are missing. Put the output on storage that all hosts share and run the "
            f"same command again: it resumes."
        )
    raw: rows.Matrix = np.load(files.raw, mmap_mode="r")
    chosen = config.extraction
    parts = _Part.of(raw, files.parts, mask, chosen)

    def finish(block: slice) -> rows.Floats:
        finished = [part.finish(raw, block) for part in parts]
        if chosen.normalise and chosen.pooling == "all":  # what is loud drowns nothing
            finished = [rows.unit_rows(part) for part in finished]
        result = np.concatenate(finished, axis=1)
        return rows.unit_rows(result) if chosen.normalise else result

    rows.write(folder / rows.FEATURES, files.shape, config.dtype, finish)
    np.save(folder / rows.MASK, mask)
    return files.shape[1]


@dataclasses.dataclass(frozen=True)
class _Part:
    """Columns that are centred and whitened together: those of CLS, or of one modality.

    Apart, because the mean would otherwise show in the zeros of an absent modality.
    """

    columns: slice
    present: npt.NDArray[np.bool_]
    means: npt.NDArray[np.float64]
    turn: npt.NDArray[np.float64] | None

    @classmethod
    def of(
        cls,
        raw: rows.Matrix,
        described: list[FeaturePart],
        mask: npt.NDArray[np.bool_],
        config: ExtractionConfig,
    ) -> "list[_Part]":
        owners = {"image": mask[:, 0], "text": mask[:, 1], None: mask[:, 0] | mask[:, 1]}
        parts, first = [], 0
        for part in described:
            present, columns = owners[part.of], slice(first, first + part.width)
            first += part.width
            values = raw[:, columns]
            means = rows.column_means(values, present) if config.center else np.zeros(part.width)
            turn = None
            if config.whiten:
                turn = rows.whitening(values, present, means, strength=config.whiten)
            parts.append(cls(columns, present, means, turn))
        return parts

    def finish(self, raw: rows.Matrix, block: slice) -> rows.Floats:
        """Return the finished columns of a block of rows."""
        centred = (raw[block, self.columns] - self.means) * self.present[block, None]
        result: rows.Floats = (centred if self.turn is None else centred @ self.turn).astype(
            np.float32
        )
        return result
