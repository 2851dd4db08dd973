"""How well held-out items are predicted, against the best constant answers (training -> report)."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignrec.data.loader import MicroBatch
from alignrec.distributed.process_group import Rank, all_reduce_sum
from alignrec.pretrain.data import TrainingData, equal_shares
from alignrec.pretrain.encoder import patchify, unpatchify
from alignrec.pretrain.engine import Engine
from alignrec.pretrain.objective import MaskedBatch, Predictions
from alignrec.pretrain.tokenizer import Words

RECONSTRUCTIONS = "reconstructions.npz"
_NUM_PICTURES = 8
_TINY_VARIANCE = 1e-6


@torch.no_grad()
def judge(engine: Engine, data: TrainingData, rank: Rank, *, batch_size: int) -> dict[str, float]:
    """Return losses and accuracy on held-out items beside the baselines; empty without any.

    Baselines are the best constants for these very targets: the most frequent token, the tokens'
    entropy, and the mean patch. So beating them means that something is read from the context.
    """
    if len(data.split.held_out) == 0:
        return {}
    architecture = engine.model.encoder.architecture
    sums = torch.zeros(6, dtype=torch.float64)  # words, patches, text loss, image loss, hits, t^2
    words = torch.zeros(architecture.vocabulary_size, dtype=torch.float64)
    patch = torch.zeros(architecture.patch_values, dtype=torch.float64)
    for share in equal_shares(
        data.split.held_out, batch_size=batch_size, rank=rank.index, num_ranks=rank.world_size
    ):
        batch = data.held_out_batch(share).to(rank.device)
        losses, predictions = engine.forward(batch)
        goals = batch.targets[batch.masked_text]
        pixels = engine.model.patch_targets(batch)
        hits = (predictions.logits.argmax(dim=1) == goals).sum()
        squares = pixels.double().square().mean(dim=1).sum()
        sums += torch.stack([*batch.counts()[:2], *losses[:2], hits, squares]).double().cpu()
        words += torch.bincount(goals, minlength=len(words)).double().cpu()
        patch += pixels.double().sum(dim=0).cpu()
    total = all_reduce_sum(torch.cat([sums, words, patch]).to(rank.device), rank).cpu()
    first, second = len(sums), len(sums) + len(words)
    return _summary(total[:first], total[first:second], total[second:])


def _summary(sums: Tensor, words: Tensor, patch: Tensor) -> dict[str, float]:
    num_words, num_patches, text_loss, image_loss, hits, squares = sums.tolist()
    result: dict[str, float] = {}
    if num_words:
        shares = words[words > 0] / num_words
        result |= {
            "text_loss": text_loss / num_words,
            "text_loss_unigram": float(-(shares * shares.log()).sum()),
            "text_accuracy": hits / num_words,
            "text_accuracy_unigram": float(words.max()) / num_words,
        }
    if num_patches:
        mean = patch / num_patches
        result |= {
            "image_loss": image_loss / num_patches,
            "image_loss_mean_patch": squares / num_patches - float(mean.square().mean()),
        }
    return result


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
    size = engine.model.encoder.architecture.patch_size
    patches = patchify(batch.images, size)
    pixels = predictions.patches
    if engine.model.normalise_patches:  # shown with the mean and deviation of the true patch
        variance, mean = torch.var_mean(patches[batch.masked_patches], dim=1, keepdim=True)
        pixels = pixels * (variance + _TINY_VARIANCE).sqrt() + mean
    masked, predicted = patches.clone(), patches.clone()
    masked[batch.masked_patches] = 0.0
    predicted[batch.masked_patches] = pixels
    named = {"original": patches, "masked": masked, "predicted": predicted}
    return {name: unpatchify(p, size).cpu().numpy() for name, p in named.items()}


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
