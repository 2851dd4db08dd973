"""How well held-out items are predicted, beside constant answers (training -> report)."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignrec.data.loader import MicroBatch
from alignrec.distributed.process_group import Rank, all_reduce_sum
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.pretrain.data import TrainingData
from alignrec.pretrain.encoder import patchify, unpatchify
from alignrec.pretrain.engine import Engine
from alignrec.pretrain.objective import MaskedBatch, Predictions
from alignrec.pretrain.targets import PictureTarget
from alignrec.pretrain.tokenizer import Words
from alignrec.telemetry import Telemetry

RECONSTRUCTIONS = "reconstructions.npz"
_NUM_PICTURES = 8


@torch.no_grad()
def judge(
    engine: Engine,
    data: TrainingData,
    rank: Rank,
    *,
    batch_size: int,
    telemetry: Telemetry,
    beat: Beat = unwatched,
) -> dict[str, float]:
    """Return losses and accuracy on held-out items beside the baselines; empty without any.

    Baselines of tokens and pixels are the best constants for these very targets: the most frequent
    token and the tokens' entropy, the mean patch. Those of codes are the target's own (see
    ``constant`` in ``targets.py``). Beating them means that something is read from the context.

    Args:
        engine: computes.
        data: gives the items.
        rank: this rank; all take part.
        batch_size: items of a rank at once.
        telemetry: shows the progress.
        beat: called after each batch.
    """
    num_items = len(data.split.judged)
    if num_items == 0:
        return {}
    model = engine.model
    sums = torch.zeros(5, dtype=torch.float64)  # words, patches, text loss, image loss, hits
    words = torch.zeros(model.encoder.architecture.vocabulary_size, dtype=torch.float64)
    pictures: Tensor | None = None
    with (
        contextlib.closing(data.held_out_batches(rank.index, batch_size=batch_size)) as shares,
        telemetry.progress(num_items, "held-out items") as progress,
    ):
        for share in shares:
            batch = data.held_out_batch(share).to(rank.device)
            losses, predictions = engine.forward(batch)
            goals = batch.targets[batch.masked_text]
            hits = (predictions.logits.argmax(dim=1) == goals).sum()
            sums += torch.stack([*batch.counts()[:2], *losses[:2], hits]).double().cpu()
            words += torch.bincount(goals, minlength=len(words)).double().cpu()
            tally = model.target.tally(predictions.patches, predictions.patch_goals).cpu()
            pictures = tally if pictures is None else pictures + tally
            progress.update(min(batch_size * rank.world_size, num_items - progress.done))
            beat()
    assert pictures is not None, "every rank has equally many shares, at least one"
    total = all_reduce_sum(torch.cat([sums, words, pictures]).to(rank.device), rank).cpu()
    first, second = len(sums), len(sums) + len(words)
    return _judge_words(total[:first], total[first:second]) | _judge_pictures(
        model.target, total[:first], total[second:]
    )


def _judge_words(sums: Tensor, words: Tensor) -> dict[str, float]:
    num_words, _, text_loss, _, hits = sums.tolist()
    if not num_words:
        return {}
    shares = words[words > 0] / num_words
    return {
        "text_loss": text_loss / num_words,
        "text_loss_unigram": float(-(shares * shares.log()).sum()),
        "text_accuracy": hits / num_words,
        "text_accuracy_unigram": float(words.max()) / num_words,
    }


def _judge_pictures(target: PictureTarget, sums: Tensor, pictures: Tensor) -> dict[str, float]:
    _, num_patches, _, image_loss, _ = sums.tolist()
    if not num_patches:
        return {}
    return target.summary(pictures, loss=image_loss, num_patches=num_patches)


@torch.no_grad()
def write_reconstructions(
    engine: Engine, data: TrainingData, words: Words, rank: Rank, folder: Path
) -> None:
    """Write a few items as they were, as masked and as predicted; every rank calls it.

    Held-out items are shown where there are any. Arrays: see docs/design/artifacts.md.
    """
    rows = data.split.held_out if len(data.split.held_out) else data.split.train
    batch = data.held_out_batch(MicroBatch(0, rows[:_NUM_PICTURES])).to(rank.device)
    _, predictions = engine.forward(batch)  # with ZeRO-3 every rank takes part
    if not rank.is_first:
        return
    arrays: dict[str, Any] = {
        "item_index": batch.item_index.cpu().numpy(),
        "has_image": batch.has_image.cpu().numpy(),
        **_pictures(engine, batch, predictions),
        **_texts(words, batch, predictions),
    }
    np.savez_compressed(folder / RECONSTRUCTIONS, **arrays)


def _pictures(
    engine: Engine, batch: MaskedBatch, predictions: Predictions
) -> dict[str, npt.NDArray[Any]]:
    target, size = engine.model.target, engine.model.encoder.architecture.patch_size
    patches = patchify(batch.images, size)
    true = patches[batch.masked_patches]
    filled = {
        "original": true,
        "masked": torch.zeros_like(true),
        "predicted": target.pixels(predictions.patches, true),
        "target": target.best_pixels(predictions.patch_goals),
    }
    result = {}
    for name, pixels in filled.items():
        if pixels is not None:
            shown = patches.clone()
            shown[batch.masked_patches] = pixels
            result[name] = unpatchify(shown, size).cpu().numpy()
    hits = target.hits(predictions.patches, predictions.patch_goals)
    if hits is not None:
        right = torch.zeros_like(batch.masked_patches)
        right[batch.masked_patches] = hits
        counts = torch.stack([right.sum(dim=1), batch.masked_patches.sum(dim=1)], dim=1)
        result["patches_right"] = counts.cpu().numpy()
    return result


def _texts(
    words: Words, batch: MaskedBatch, predictions: Predictions
) -> dict[str, npt.NDArray[Any]]:
    shown = batch.targets.clone()
    shown[batch.masked_text] = words.mask_id
    guess = batch.targets.clone()
    guess[batch.masked_text] = predictions.logits.argmax(dim=1)
    result = {}
    for name, ids in (("original", batch.targets), ("masked", shown), ("predicted", guess)):
        texts = [
            words.text(row[~padding].tolist())
            for row, padding in zip(ids, batch.text_padding, strict=True)
        ]
        result[f"text_{name}"] = np.array(texts, dtype=np.str_)
    return result
