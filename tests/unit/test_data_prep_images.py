"""Pictures: good ones become upright RGB JPEGs, each kind of bad one is refused with its reason."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep import images
from data_prep.images import BadImage, ImageRules
from data_prep.quarantine import Reason

RULES = ImageRules(
    root="/", allowed_schemes=(), max_side=64, min_side=4, jpeg_quality=90,
    max_bytes=200_000, max_pixels=1_000_000,
)  # fmt: skip


def picture(width: int = 40, height: int = 30, mode: str = "RGB", seed: int = 0) -> Image.Image:
    rng = np.random.default_rng(seed)
    rough = Image.fromarray(rng.integers(80, 176, (4, 4, 3), dtype=np.uint8))
    return rough.resize((width, height), Image.Resampling.BICUBIC).convert(mode)


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert image.format == "JPEG"
        assert image.mode == "RGB"
        return np.asarray(image).astype(int)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: a decompression bomb."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        chunk(b"IDAT", zlib.compress(bytes(1000))),
        chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def test_right_bytes_stay_untouched() -> None:
    data = encoded(picture(64, 30))
    prepared = images.prepare(data, RULES)
    assert prepared.data == data
    assert prepared.kept
    assert (prepared.width, prepared.height) == (64, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize(("width", "height"), [(130, 65), (65, 130), (900, 5), (10, 10)])
def test_pictures_of_any_kind_become_small_jpegs(kind: str, width: int, height: int) -> None:
    original = picture(width, height)
    prepared = images.prepare(encoded(original, kind), RULES)
    shape = pixels(prepared.data).shape
    assert shape == (prepared.height, prepared.width, 3)
    assert max(shape[:2]) == min(max(width, height), RULES.max_side)
    small = original.resize((prepared.width, prepared.height), Image.Resampling.LANCZOS)
    assert abs(pixels(prepared.data) - np.asarray(small).astype(int)).mean() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(48, 24), exif=exif, quality=95)
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    prepared = images.prepare(data, RULES)
    assert prepared.kept == (orientation == 1)
    assert (prepared.width, prepared.height) == expected.size
    assert abs(pixels(prepared.data) - np.asarray(expected).astype(int)).mean() < 4
    assert images.prepare(prepared.data, RULES).kept  # the orientation is not applied twice


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "LA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(mode: str) -> None:
    grey = Image.new("L", (20, 20), 128)
    if mode == "I;16":
        image = Image.fromarray(np.full((20, 20), 128 << 8, dtype=np.uint16))
    else:
        image = grey.convert("RGB").convert(mode) if mode == "CMYK" else grey.convert(mode)
    prepared = images.prepare(encoded(image, "JPEG" if mode == "CMYK" else "PNG"), RULES)
    if mode != "1":
        assert abs(pixels(prepared.data) - 128).mean() < 4
    assert pixels(prepared.data).shape == (20, 20, 3)


def test_transparent_parts_become_white() -> None:
    clear = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    assert pixels(images.prepare(encoded(clear, "PNG"), RULES).data).min() > 250


def test_the_first_frame_of_an_animation_is_used() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    prepared = images.prepare(data, RULES)
    assert prepared.animated
    assert pixels(prepared.data)[8, 8, 0] > 200


JPEG = encoded(picture(60, 60))
LARGE_JPEG = encoded(picture(300, 300))
PNG = encoded(picture(60, 60), "PNG")
BAD_BYTES = {
    "text": (b"this is not a picture", Reason.IMAGE_NOT_AN_IMAGE),
    "html": (b"<html>404</html>", Reason.IMAGE_NOT_AN_IMAGE),
    "zeros": (bytes(5000), Reason.IMAGE_NOT_AN_IMAGE),
    "one byte": (b"\xff", Reason.IMAGE_NOT_AN_IMAGE),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Reason.IMAGE_NOT_AN_IMAGE),
    "svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", Reason.IMAGE_NOT_AN_IMAGE),
    "tiff": (encoded(picture(), "TIFF"), Reason.IMAGE_NOT_AN_IMAGE),
    "jpeg start only": (b"\xff\xd8\xff\xe0", Reason.IMAGE_NOT_AN_IMAGE),
    "jpeg cut in half": (JPEG[: len(JPEG) // 2], Reason.IMAGE_TRUNCATED),
    "large jpeg cut": (LARGE_JPEG[: len(LARGE_JPEG) // 2], Reason.IMAGE_TRUNCATED),
    "jpeg cut at the end": (JPEG[:-40], Reason.IMAGE_TRUNCATED),
    "png cut in half": (PNG[: len(PNG) // 2], Reason.IMAGE_TRUNCATED),
    "webp cut": (encoded(picture(), "WEBP")[:60], None),
    "gif cut": (encoded(picture(), "GIF")[:-300], Reason.IMAGE_TRUNCATED),
    "bmp cut": (encoded(picture(), "BMP")[:-3000], Reason.IMAGE_TRUNCATED),
    "png with a wrong checksum": (PNG[:40] + b"\x00\x01\x02" + PNG[43:], None),
    "png bomb": (png_of_size(60_000, 60_000), Reason.IMAGE_TOO_MANY_PIXELS),
    "png just too large": (png_of_size(1001, 1000), Reason.IMAGE_TOO_MANY_PIXELS),
    "png without pixels": (png_of_size(100, 100), Reason.IMAGE_TRUNCATED),
    "png of size 0": (png_of_size(0, 10), None),
    "one pixel": (encoded(picture(1, 1), "PNG"), Reason.IMAGE_TOO_SMALL),
    "a line": (encoded(picture(60, 2), "PNG"), Reason.IMAGE_TOO_SMALL),
}


@pytest.mark.parametrize("name", BAD_BYTES)
def test_bad_bytes_are_refused_with_their_reason(name: str) -> None:
    data, reason = BAD_BYTES[name]
    with pytest.raises(BadImage) as caught:
        images.prepare(data, RULES)
    if reason is None:  # which of these it is, the version of the decoder decides
        allowed = {Reason.IMAGE_CORRUPT, Reason.IMAGE_TRUNCATED, Reason.IMAGE_NOT_AN_IMAGE}
        assert caught.value.reason in allowed
    else:
        assert caught.value.reason == reason


def test_random_damage_never_raises_anything_else() -> None:
    rng = np.random.default_rng(0)
    for data in (JPEG, PNG, encoded(picture(), "GIF"), encoded(picture(), "WEBP")):
        for _ in range(60):
            damaged = bytearray(data)
            for position in rng.integers(0, len(damaged), 4):
                damaged[position] = rng.integers(256)
            try:
                prepared = images.prepare(bytes(damaged), RULES)
            except BadImage:
                continue
            assert max(pixels(prepared.data).shape[:2]) <= RULES.max_side
