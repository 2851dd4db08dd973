"""JPEG bytes to square RGB pixels: resized for evaluation, cropped and flipped for training."""

import io

import numpy as np
import numpy.typing as npt
from PIL import Image

from alignrec.errors import StageFailure

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

_CROP_AREA = (0.5, 1.0)  # share of the picture that a random crop keeps (BEiT-3)
_LOG_ASPECT = np.log(4.0 / 3.0)
_CROP_ATTEMPTS = 10
_REDUCING_GAP = 2.0  # resize in two steps: first an integer shrink, then bicubic


def decode(content: bytes, *, size: int, rng: np.random.Generator | None, name: str) -> Pixels:
    """Return a picture as ``(size, size, 3)`` uint8.

    Args:
        content: a JPEG (or what else Pillow reads) that data_prep has checked.
        size: side in pixels; the aspect ratio is not kept, as in BEiT-3.
        rng: source of the random crop and flip; None takes the whole picture, unflipped.
        name: what a failure calls the picture.

    Raises:
        StageFailure: the bytes are no picture.
    """
    try:
        with Image.open(io.BytesIO(content)) as picture:
            flip = bool(rng.random() < 0.5) if rng is not None else False
            # draft lets libjpeg decode at 1/2, 1/4 or 1/8 scale, but never below the size asked
            share = 1.0 if rng is None else _CROP_AREA[0] ** 0.5
            picture.draft("RGB", (int(size / share) + 1, int(size / share) + 1))
            rgb = picture.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise StageFailure(
            f"the picture of {name} cannot be decoded ({error}), though data_prep accepted it. "
            f"Run data_prep again."
        ) from error
    box: Box = (0.0, 0.0, float(rgb.width), float(rgb.height))
    if rng is not None:
        box = crop_box(rgb.width, rgb.height, rng=rng)
    resized = rgb.resize(
        (size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=_REDUCING_GAP
    )
    pixels = np.asarray(resized)
    return np.ascontiguousarray(pixels[:, ::-1]) if flip else pixels


def crop_box(width: int, height: int, *, rng: np.random.Generator) -> Box:
    """Return a random crop (left, top, right, bottom) in pixels of the source.

    Area and aspect as in torchvision's RandomResizedCrop with scale (0.5, 1), ratio (3/4, 4/3).
    """
    for _ in range(_CROP_ATTEMPTS):
        area = rng.uniform(*_CROP_AREA) * width * height
        aspect = np.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
        w, h = (area * aspect) ** 0.5, (area / aspect) ** 0.5
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return (left, top, left + w, top + h)
    return (0.0, 0.0, float(width), float(height))
