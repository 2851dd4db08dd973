"""JPEG bytes to square RGB pixels: resized for evaluation, cropped and flipped for training."""

import contextlib
import dataclasses
import io

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
from PIL import Image

from alignrec.errors import StageFailure

Pixels = npt.NDArray[np.uint8]
Box = tuple[float, float, float, float]

_CROP_AREA = (0.5, 1.0)  # share of the picture that a random crop keeps (BEiT-3)
_LOG_ASPECT = np.log(4.0 / 3.0)
_CROP_ATTEMPTS = 10
_PLAIN = ("YCbCr", "RGB", "Gray")  # colour spaces that the fast decoder turns into RGB
_JPEG_MARK = b"\xff\xd8"
_SHRINKS = (8, 4, 2)  # scales that libjpeg decodes at for less than a whole picture costs


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
        header = _Header.of(content)
        flip, box = False, (0.0, 0.0, float(header.width), float(header.height))
        if rng is not None:
            flip = bool(rng.random() < 0.5)
            box = crop_box(header.width, header.height, rng=rng)
        pixels = _read(content, header, shrink=_shrink(box, size))
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise StageFailure(
            f"the picture of {name} cannot be decoded ({error}), though data_prep accepted it. "
            f"Run data_prep again."
        ) from error
    return _resize(_cut(pixels, box, header), size, flip=flip)


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


@dataclasses.dataclass(frozen=True)
class _Header:
    """What is known of a picture before it is decoded; sides in pixels."""

    width: int
    height: int
    is_plain: bool  # the fast decoder is for it: no PNG, no CMYK, no bomb

    @classmethod
    def of(cls, content: bytes) -> "_Header":
        """Read the header."""
        if content.startswith(_JPEG_MARK):
            with contextlib.suppress(ValueError):
                height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
                if colours in _PLAIN and height * width <= (Image.MAX_IMAGE_PIXELS or 0):
                    return cls(width, height, is_plain=True)
        with Image.open(io.BytesIO(content)) as picture:
            return cls(picture.width, picture.height, is_plain=False)


def _shrink(box: Box, size: int) -> int:
    """Return by which factor to decode smaller: never below the pixels that the crop needs."""
    least = min(box[2] - box[0], box[3] - box[1])
    return next((factor for factor in _SHRINKS if least >= factor * size), 1)


def _read(content: bytes, header: _Header, *, shrink: int) -> Pixels:
    """Decode to (height, width, 3), both divided by ``shrink`` and rounded up."""
    if header.is_plain:
        least = {}
        if shrink > 1:
            least = {
                "min_height": -(-header.height // shrink),
                "min_width": -(-header.width // shrink),
            }
        # What libjpeg merely warns of is an error here; Pillow knows which is which.
        with contextlib.suppress(ValueError):
            pixels: Pixels = simplejpeg.decode_jpeg(content, **least)
            return pixels
    with Image.open(io.BytesIO(content)) as picture:
        if shrink > 1:
            picture.draft("RGB", (header.width // shrink, header.height // shrink))
        return np.array(picture.convert("RGB"))


def _cut(pixels: Pixels, box: Box, header: _Header) -> Pixels:
    """Return the crop of a decoded picture; the box is in pixels of the source."""
    across, down = pixels.shape[1] / header.width, pixels.shape[0] / header.height
    left, top = int(box[0] * across), int(box[1] * down)
    right, bottom = round(box[2] * across), round(box[3] * down)
    return pixels[top : max(bottom, top + 1), left : max(right, left + 1)]


def _resize(pixels: Pixels, size: int, *, flip: bool) -> Pixels:
    """Resize to a square, bicubic with antialiasing: torch's is some five times Pillow's speed."""
    whole = torch.from_numpy(np.ascontiguousarray(pixels))[None]  # (1, height, width, 3)
    # Seen as (1, 3, height, width), but in the order of memory in which (height, width, 3) leaves.
    planes = whole.permute(0, 3, 1, 2)
    if planes.shape[2:] != (size, size):
        planes = torch.nn.functional.interpolate(
            planes, (size, size), mode="bicubic", antialias=True
        )
    if flip:
        planes = planes.flip(3)
    square: Pixels = planes[0].permute(1, 2, 0).numpy()
    return square
