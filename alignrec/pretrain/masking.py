"""Which patches and tokens are hidden (loader -> objective): a function of (seed, epoch, item).

Patches are masked in blocks as in BEiT (Bao et al. 2022, algorithm 1), scaled to the grid; the
number masked is exact. Tokens are masked as in BERT: 80 % [MASK], 10 % random, 10 % kept.
"""

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from alignrec.data.loader import NO_ITEM, ItemBatch

Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_STREAM = 4  # stream number of masks, apart from those of order and crops
_BLOCK_SHARE = 16 / 196  # smallest block: 16 of BEiT's 196 patches
_LOG_ASPECT = math.log(1 / 0.3)
_BLOCK_ATTEMPTS = 10
_REPLACED, _RANDOM = 0.8, 0.1  # of the masked tokens; the rest keep their id


@dataclasses.dataclass(frozen=True)
class MaskSettings:
    """What decides the masks.

    Attributes:
        seed: of the run.
        patch_ratio: share of patches masked.
        paired_text_ratio: share of tokens masked beside a picture.
        alone_text_ratio: share of tokens masked without a picture.
        patches_per_side: grid of patches.
        mask_id: token that stands for a masked one.
        special_ids: tokens that are never masked nor stand for a masked one, ascending.
        vocabulary_size: one past the largest id.
    """

    seed: int
    patch_ratio: float
    paired_text_ratio: float
    alone_text_ratio: float
    patches_per_side: int
    mask_id: int
    special_ids: tuple[int, ...]
    vocabulary_size: int


@dataclasses.dataclass(frozen=True)
class Masks:
    """What is hidden in a batch.

    Attributes:
        patches: (batch, patches) bool, True where masked.
        text: (batch, length) bool, True where the token must be predicted.
        tokens: (batch, length) int64: the tokens as the encoder sees them.
    """

    patches: Bools
    text: Bools
    tokens: Ints


def draw_masks(batch: ItemBatch, settings: MaskSettings, *, epoch: int) -> Masks:
    """Draw the masks of a batch; an item's masks do not depend on what is beside it."""
    side = settings.patches_per_side
    patches = np.zeros((len(batch.item_index), side * side), dtype=bool)
    text = np.zeros(batch.tokens.shape, dtype=bool)
    tokens = batch.tokens.copy()
    for row, item_index in enumerate(batch.item_index):
        if item_index == NO_ITEM:
            continue
        rng = np.random.default_rng([settings.seed, _STREAM, epoch, int(item_index)])
        if batch.has_image[row]:
            count = round(settings.patch_ratio * side * side)
            patches[row] = mask_blocks(side, count, rng).ravel()
        paired = bool(batch.has_image[row])
        ratio = settings.paired_text_ratio if paired else settings.alone_text_ratio
        is_word = np.isin(batch.tokens[row], settings.special_ids, invert=True)
        words = np.flatnonzero(is_word & ~batch.text_padding[row])
        chosen = mask_words(words, ratio, rng)
        text[row, chosen] = True
        tokens[row, chosen] = replace_words(tokens[row, chosen], settings, rng)
    return Masks(patches, text, tokens)


def mask_blocks(side: int, count: int, rng: np.random.Generator) -> Bools:
    """Mask ``count`` of side x side patches: blocks first, single patches for what is left."""
    masked = np.zeros((side, side), dtype=bool)
    smallest = max(1.0, _BLOCK_SHARE * side * side)
    for _ in range(_BLOCK_ATTEMPTS):
        left = count - int(masked.sum())
        if left < smallest:
            break
        area = rng.uniform(smallest, left)
        aspect = math.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        height = min(side, max(1, round(math.sqrt(area * aspect))))
        width = min(side, max(1, round(math.sqrt(area / aspect))))
        top = int(rng.integers(side - height + 1))
        start = int(rng.integers(side - width + 1))
        block = masked[top : top + height, start : start + width]
        if block.size - int(block.sum()) <= left:
            block[...] = True
    free = np.flatnonzero(~masked.ravel())
    left = count - int(masked.sum())
    masked.ravel()[rng.choice(free, size=left, replace=False)] = True
    return masked


def mask_words(words: Ints, ratio: float, rng: np.random.Generator) -> Ints:
    """Choose a share of the word positions: at least one when there are any and ratio > 0."""
    count = math.ceil(ratio * len(words)) if ratio else 0
    return rng.choice(words, size=count, replace=False)


def replace_words(tokens: Ints, settings: MaskSettings, rng: np.random.Generator) -> Ints:
    """Return what the encoder sees in place of masked tokens: 80 % mask, 10 % random, 10 % kept."""
    draw = rng.random(len(tokens))
    num_words = settings.vocabulary_size - len(settings.special_ids)
    anything = rng.integers(num_words, size=len(tokens))  # counts words alone
    for special in settings.special_ids:
        anything += anything >= special
    shown = np.where(draw < _REPLACED + _RANDOM, anything, tokens)
    return np.where(draw < _REPLACED, settings.mask_id, shown)
