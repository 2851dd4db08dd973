"""What the trainer reads: which items, how they are batched, masked and prefetched."""

import dataclasses
from collections.abc import Generator, Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from alignrec.data.loader import ItemReader, Loader, MicroBatch, Plan
from alignrec.data.order import item_places
from alignrec.data.shards import SampleTable, ShardReader, open_shards
from alignrec.errors import UserError
from alignrec.pretrain.config import LoaderConfig, PretrainConfig
from alignrec.pretrain.masking import MaskSettings, draw_masks
from alignrec.pretrain.objective import MaskedBatch
from alignrec.pretrain.tokenizer import Words

Ints = npt.NDArray[np.int64]

_MAX_JUDGED = 50_000  # the numbers of more would differ in the third digit


@dataclasses.dataclass(frozen=True)
class Split:
    """Which rows of the sample table are for what.

    Attributes:
        train: to train on.
        held_out: kept out of training.
        judged: of these, on which predictions are judged: all of them, or those that come first in
            the order of a hash.
    """

    train: Ints
    held_out: Ints
    judged: Ints


@dataclasses.dataclass(frozen=True)
class TrainingData:
    """Everything that turns steps into masked batches on this rank."""

    plan: Plan
    split: Split
    train_reader: ItemReader
    whole_reader: ItemReader
    masks: MaskSettings
    shards: ShardReader

    def close(self) -> None:
        """Close the shards."""
        self.shards.close()

    def training_batch(self, batch: MicroBatch) -> MaskedBatch:
        """Read, crop, tokenise and mask one micro batch."""
        items = self.train_reader.read(batch)
        return MaskedBatch.of(items, draw_masks(items, self.masks, epoch=batch.epoch))

    def held_out_batch(self, batch: MicroBatch) -> MaskedBatch:
        """Read whole pictures and mask them as in epoch 0."""
        items = self.whole_reader.read(batch)
        return MaskedBatch.of(items, draw_masks(items, self.masks, epoch=batch.epoch))

    def rank_batches(
        self, first_step: int, last_step: int, rank: int
    ) -> Generator[MicroBatch, None, None]:
        """Yield this rank's micro batches from one step up to before another."""
        planned = (
            batch
            for step in range(first_step, last_step)
            for batch in self.plan.micro_batches(step, rank)
        )
        return self.shards.fetched_ahead(planned, lambda batch: batch.rows)

    def held_out_batches(self, rank: int, *, batch_size: int) -> Generator[MicroBatch, None, None]:
        """Yield this rank's share of the judged items, as many batches for each rank."""
        shares = equal_shares(
            self.split.judged, batch_size=batch_size, rank=rank, num_ranks=self.plan.num_ranks
        )
        return self.shards.fetched_ahead(shares, lambda batch: batch.rows)


def open_training_data(
    dataset: Path, config: PretrainConfig, words: Words, *, num_ranks: int
) -> TrainingData:
    """Read the sample table and settle who reads what.

    Raises:
        UserError: nothing is left to train on, or far-away shards have too small a cache.
    """
    table = SampleTable.read(dataset)
    split = split_rows(table, config)
    shards = open_shards(dataset, table, config.loader.shards)
    size = config.encoder.image_size
    plan = make_plan(split, config, num_ranks=num_ranks)
    check_room(plan, shards, config.loader)
    return TrainingData(
        plan=plan,
        split=split,
        train_reader=ItemReader(
            shards,
            words.batch,
            image_size=size,
            padding_id=words.padding_id,
            augment_seed=config.seed,
        ),
        whole_reader=ItemReader(shards, words.batch, image_size=size, padding_id=words.padding_id),
        masks=mask_settings(config, words),
        shards=shards,
    )


def make_plan(split: Split, config: PretrainConfig, *, num_ranks: int) -> Plan:
    """Return which samples each rank reads at each step."""
    micro, accumulation = config.split_batch(num_ranks)
    return Plan(
        rows=split.train,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=micro,
        num_ranks=num_ranks,
        accumulation=accumulation,
        block_size=config.loader.block_size,
        window_size=config.loader.window_size,
    )


def describe_batch(plan: Plan) -> str:
    """Return how a global batch is split, for a person."""
    split = f"{plan.micro_batch_size} x {plan.accumulation} x {plan.num_ranks} ranks"
    product = plan.micro_batch_size * plan.accumulation * plan.num_ranks
    if product == plan.global_batch_size:
        return f"{product} = {split}"
    return f"{plan.global_batch_size} in at most {split} = {product}"


def check_room(plan: Plan, shards: ShardReader, config: LoaderConfig) -> None:
    """Refuse a cache that cannot hold what is shuffled together: it would fetch for every item.

    Raises:
        UserError: far-away shards have too small a cache.
    """
    if config.shards.root is None:
        return
    order, size = plan.order(epoch=0), plan.window_size
    last = (len(plan.rows) - 1) // size
    needed = 0
    for window in {0, last // 3, 2 * last // 3, last}:
        positions = np.arange(window * size, min((window + 1) * size, len(plan.rows)))
        needed = max(needed, shards.bytes_of(plan.rows[order.samples(positions)]))
    if needed > config.shards.cache_bytes:
        raise UserError(
            f"pretrain.loader.shards.cache_bytes={config.shards.cache_bytes} holds less than the "
            f"shards of one window ({needed} bytes for {min(size, len(plan.rows))} samples that "
            f"are shuffled together), so each would be fetched many times. Raise it, set "
            f"loader.block_size to the samples of a shard, or lower loader.window_size."
        )


def split_rows(table: SampleTable, config: PretrainConfig) -> Split:
    """Split by a hash of item_index, so that an item keeps its side when the catalogue grows."""
    places = item_places(table.item_index, seed=config.seed)
    held_out = np.flatnonzero(places < config.valid_fraction)
    judged = held_out
    if len(held_out) > _MAX_JUDGED:
        first = np.argpartition(places[held_out], _MAX_JUDGED)[:_MAX_JUDGED]
        judged = np.sort(held_out[first])
    split = Split(np.flatnonzero(places >= config.valid_fraction), held_out, judged)
    if len(split.train) == 0:
        raise UserError(
            f"none of the {len(table)} items is left to train on with "
            f"pretrain.valid_fraction={config.valid_fraction}. Lower it."
        )
    return split


def mask_settings(config: PretrainConfig, words: Words) -> MaskSettings:
    """Return what decides the masks."""
    encoder = config.encoder  # its architecture may ask a hub, which rank 0 alone does
    return MaskSettings(
        seed=config.seed,
        patch_ratio=config.objective.patch_ratio,
        paired_text_ratio=config.objective.paired_text_ratio,
        alone_text_ratio=config.objective.alone_text_ratio,
        patches_per_side=encoder.image_size // encoder.patch_size,
        mask_id=words.mask_id,
        special_ids=words.special_ids,
        vocabulary_size=words.vocabulary_size,
    )


def make_loader(
    data: TrainingData, config: PretrainConfig, *, device: torch.device
) -> Loader[MaskedBatch]:
    """Return the loader of training batches, on the host; for a GPU in memory that it reads."""

    def make(batch: MicroBatch) -> MaskedBatch:
        made = data.training_batch(batch)
        return made.pinned() if device.type == "cuda" else made

    return Loader(
        make,
        num_threads=config.loader.num_threads,
        prefetch=config.loader.prefetch,
    )


def equal_shares(rows: Ints, *, batch_size: int, rank: int, num_ranks: int) -> Iterable[MicroBatch]:
    """Deal rows out in batches, equally many for each rank (the last may be empty)."""
    num_batches = -(-len(rows) // batch_size)
    for number in range(-(-num_batches // num_ranks)):
        start = (number * num_ranks + rank) * batch_size
        yield MicroBatch(0, rows[start : start + batch_size])
