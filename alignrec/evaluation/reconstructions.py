"""What the encoder predicted of a few masked samples (encoder -> report)."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from alignrec.evaluation.showcase import Thumbnail, encode_picture

FILE = "reconstructions.npz"
# Arrays of pictures -> what they are called; codes are shown by the mean patch of each.
STATES = {
    "original": "original",
    "masked": "masked",
    "predicted": "predicted",
    "target": "true codes",
}
_MASK = "<mask>"
_MAX_SHOWN = 6


@dataclasses.dataclass(frozen=True)
class Reconstruction:
    """One sample: as it is, as the encoder saw it, as it filled in what was masked.

    Attributes:
        pictures: a picture for each of STATES; empty where the sample has none.
        masked_text: the text between the masks, in order; empty where there is no text.
        texts: the original and the predicted text.
        patches_right: masked patches whose code was predicted, and masked patches; None where
            pixels are predicted or there is no picture.
    """

    pictures: dict[str, Thumbnail]
    masked_text: tuple[str, ...]
    texts: dict[str, str]
    patches_right: tuple[int, int] | None = None


def read_reconstructions(encoder: Path) -> list[Reconstruction]:
    """Return the first samples of an encoder's ``reconstructions.npz``; none where it has none."""
    path = encoder / FILE
    if not path.exists():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    pictures = {state: stored[state] for state in STATES if state in stored}
    texts = {state: stored[f"text_{state}"] for state in STATES if f"text_{state}" in stored}
    count = min((len(stack) for stack in (*pictures.values(), *texts.values())), default=0)
    has_image = stored.get("has_image", np.ones(count, dtype=bool))
    return [
        Reconstruction(
            _pictures(pictures, i) if has_image[i] else {},
            tuple(str(texts["masked"][i]).split(_MASK)) if "masked" in texts else (),
            {state: str(texts[state][i]) for state in ("original", "predicted") if state in texts},
            _patches_right(stored, i) if has_image[i] else None,
        )
        for i in range(min(count, _MAX_SHOWN))
    ]


def _pictures(stacks: dict[str, np.ndarray[Any, Any]], index: int) -> dict[str, Thumbnail]:
    return {
        STATES[state]: encode_picture(Image.fromarray(_bytes(stack[index])))
        for state, stack in stacks.items()
    }


def _patches_right(stored: dict[str, np.ndarray[Any, Any]], index: int) -> tuple[int, int] | None:
    if "patches_right" not in stored:
        return None
    right, masked = stored["patches_right"][index].tolist()
    return right, masked


def _bytes(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if picture.dtype == np.uint8:
        return picture
    return np.asarray(picture * 255).clip(0, 255).round().astype(np.uint8)
