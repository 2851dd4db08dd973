"""Picture of an item: bytes in, a checked JPEG or a reason out (fetching -> shards)."""

import dataclasses
import io
from typing import Any, Self

import numpy as np
from PIL import Image, UnidentifiedImageError

from alignrec.configuration import digest
from data_prep.config import HttpConfig, ImagesConfig
from data_prep.quarantine import Reason

# No EPS, PDF and the like: their decoders run programs or read other files.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Raised whenever the same bytes would become another picture.
_PREPARATION_VERSION = 1
_SEVERAL = "MPO"  # what Pillow calls a JPEG with a second one behind it, as stereo cameras write
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_WHITE = (255, 255, 255)
# Each scan of a progressive JPEG is a pass over all pixels and can be 12 bytes long; encoders make
# about ten.
_SCAN = b"\xff\xda"
_MAX_SCANS = 200


@dataclasses.dataclass(frozen=True)
class ImageRules:
    """What a picture may be and becomes; see ``ImagesConfig`` for the fields.

    Attributes:
        root: absolute folder or URL that relative references start from.
    """

    root: str
    allowed_schemes: tuple[str, ...]
    max_side: int
    min_side: int
    jpeg_quality: int
    max_bytes: int
    max_pixels: int
    allowed_hosts: tuple[str, ...] = ()
    private_hosts: tuple[str, ...] = ()
    http: HttpConfig = dataclasses.field(default_factory=HttpConfig)

    @classmethod
    def of(cls, config: ImagesConfig, *, root: str) -> Self:
        """Return the rules of a recipe; the scheme of a web root is allowed by being named."""
        names = [field.name for field in dataclasses.fields(cls) if field.name != "root"]
        values = {name: getattr(config, name) for name in names}
        web = [root.partition("://")[0]] if root.lower().startswith(("http://", "https://")) else []
        values["allowed_schemes"] = tuple(s.lower() for s in (*config.allowed_schemes, *web))
        for name in ("allowed_hosts", "private_hosts"):
            values[name] = tuple(map(_spelled, values[name]))
        return cls(root=root, **values)

    @property
    def preparation(self) -> str:
        """Digest of all that decides what becomes of a picture's bytes."""
        return digest(
            [
                _PREPARATION_VERSION,
                self.max_side,
                self.min_side,
                self.jpeg_quality,
                self.max_bytes,
                self.max_pixels,
            ]
        )


def _spelled(host: str) -> str:
    """Return a host as addresses spell it when they are compared."""
    lower = host.lower().rstrip(".")
    return lower if lower.isascii() else lower.encode("idna").decode()


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as it goes into a shard.

    Attributes:
        data: JPEG, RGB, upright, no side above ``max_side``.
        width: pixels of ``data``.
        height: pixels of ``data``.
        kept: ``data`` is the file as it came.
        animated: only the first of several frames is in ``data``.
    """

    data: bytes
    width: int
    height: int
    kept: bool
    animated: bool


class BadImage(Exception):
    """A picture that cannot be used.

    Attributes:
        transient: the cause may pass (a time-out, a busy host): worth another try some day.
    """

    def __init__(self, reason: Reason, detail: str, *, transient: bool = False) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
        self.transient = transient


def prepare(data: bytes, rules: ImageRules) -> Picture:
    """Check a picture by decoding it, and make it upright, RGB, JPEG and small enough.

    Bytes that already are all of that stay as they are.

    Raises:
        BadImage: not a picture, broken, too large or too small.
    """
    # Our own check of the size comes before the decoder; Pillow's would only warn.
    Image.MAX_IMAGE_PIXELS = None
    try:
        return _prepare(data, rules)
    except BadImage:
        raise
    except UnidentifiedImageError as error:
        raise BadImage(Reason.IMAGE_NOT_AN_IMAGE, f"begins with {data[:16]!r}") from error
    except Exception as error:  # decoders raise a dozen kinds of exceptions on hostile bytes
        truncated = "truncated" in str(error).lower()
        reason = Reason.IMAGE_TRUNCATED if truncated else Reason.IMAGE_CORRUPT
        raise BadImage(reason, f"{type(error).__name__}: {error}") from error


def _prepare(data: bytes, rules: ImageRules) -> Picture:
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        _check_size(image, data, rules)
        if image.format == "PNG":
            image.load()  # reading EXIF would do it and pass over the damage that it meets
        orientation = _orientation(image)
        right = image.format == "JPEG" and image.mode == "RGB" and orientation == 1
        width, height = image.size
        if right and max(width, height) <= rules.max_side:
            image.load()
            return Picture(data, width, height, kept=True, animated=False)
        animated = image.format != _SEVERAL and bool(getattr(image, "is_animated", False))
        upright = _shrunk(image, rules.max_side, orientation)
    buffer = io.BytesIO()
    upright.save(buffer, "JPEG", quality=rules.jpeg_quality, comment=b"")
    return Picture(buffer.getvalue(), *upright.size, kept=False, animated=animated)


def _check_size(image: Image.Image, data: bytes, rules: ImageRules) -> None:
    """Refuse a picture, before it is decoded, for the work and the memory that it would take."""
    width, height = image.size
    if width * height > rules.max_pixels:
        raise BadImage(
            Reason.IMAGE_TOO_MANY_PIXELS, f"{width} x {height} pixels in {len(data)} bytes"
        )
    if min(width, height) < rules.min_side:
        raise BadImage(Reason.IMAGE_TOO_SMALL, f"{width} x {height} pixels")
    if "progressive" in image.info and data.count(_SCAN) > _MAX_SCANS:
        raise BadImage(Reason.IMAGE_CORRUPT, f"{data.count(_SCAN)} scans: would take for ever")


def _shrunk(image: Image.Image, max_side: int, orientation: int) -> Image.Image:
    """Return the picture in RGB, upright, with no side above ``max_side``."""
    size = _fitting(image.size, max_side)
    # libjpeg decodes at 1/2, 1/4 or 1/8 of the size in a fraction of the time. The smallest that is
    # not below the final size loses about as little as averaging over areas (40 to 47 dB PSNR to
    # the picture resized as a whole; JPEG itself at quality 90 loses as much).
    image.draft(None, size)
    pixels = _rgb(image)
    if pixels.size != size:
        pixels = pixels.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0)
    turn = _TURNS.get(orientation)
    return pixels if turn is None else pixels.transpose(turn)


def _fitting(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    width, height = size
    scale = min(1.0, max_side / max(size))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _rgb(image: Image.Image) -> Image.Image:
    """Return the first frame in RGB, transparent parts on white."""
    if image.mode.startswith("I"):  # 16 bits a pixel; convert() would clip instead of scale
        deep = np.asarray(image) >> 8
        return Image.fromarray(deep.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        background = Image.new("RGB", layer.size, _WHITE)
        background.paste(layer, mask=layer.getchannel("A"))
        return background
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 when there is none or the EXIF block is damaged."""
    try:
        value: Any = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return value if value in range(1, 9) else 1
