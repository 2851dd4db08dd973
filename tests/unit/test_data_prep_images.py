"""Pictures: good ones become upright RGB JPEGs, each kind of bad one is refused with its reason."""

import contextlib
import io
import struct
import tracemalloc
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


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: a decompression bomb."""

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


def test_all_sixteen_bits_are_scaled_not_cut() -> None:
    ramp = np.linspace(0, 65535, 64 * 16).astype(np.uint16).reshape(16, 64)
    found = pixels(images.prepare(encoded(Image.fromarray(ramp), "PNG"), RULES).data)
    assert abs(found[..., 0] - (ramp >> 8)).mean() < 2


def natural(width: int, height: int) -> Image.Image:
    """Structure of all sizes, the smaller the weaker, as photographs have it."""
    rng = np.random.default_rng(1)
    total = np.full((height, width, 3), 128.0)
    for octave in range(8):
        cells = rng.integers(0, 256, (3 << octave, 4 << octave, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(layer) - 128.0) * 0.5 ** (octave + 1)
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}])
@pytest.mark.parametrize(("width", "height"), [(130, 70), (256, 192), (500, 375), (750, 1000)])
def test_fast_decoding_loses_about_as_little_as_averaging_over_areas(
    width: int, height: int, options: dict[str, Any]
) -> None:
    data = encoded(natural(width, height), quality=90, **options)
    prepared = images.prepare(data, RULES)
    size = (prepared.width, prepared.height)

    def resized(how: Image.Resampling) -> np.ndarray:
        whole = Image.open(io.BytesIO(data)).resize(size, how)
        return pixels(encoded(whole, quality=RULES.jpeg_quality))

    def loss(found: np.ndarray) -> float:
        return float(((found - resized(Image.Resampling.LANCZOS)) ** 2).mean())

    assert loss(pixels(prepared.data)) < 2 * loss(resized(Image.Resampling.BOX))


def test_inks_of_a_press_become_colours() -> None:
    """Adobe writes the four inks inverted; red is no cyan, all magenta and all yellow."""
    inks = Image.merge("CMYK", [Image.new("L", (32, 32), v) for v in (0, 255, 255, 0)])
    for data in (encoded(inks), encoded(inks.resize((200, 200)))):
        assert b"Adobe" in data
        assert abs(pixels(images.prepare(data, RULES).data) - (255, 0, 0)).max() < 30


def test_a_jpeg_with_a_second_one_behind_it_is_its_first() -> None:
    views = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    data = encoded(views[0], "MPO", save_all=True, append_images=views[1:])
    prepared = images.prepare(data, RULES)
    assert not prepared.kept
    assert not prepared.animated
    assert (pixels(prepared.data) - (254, 0, 0)).max() < 3
    assert len(prepared.data) < len(data)


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA"])
def test_transparent_parts_of_every_mode_become_white(mode: str) -> None:
    layer = Image.new("RGBA", (16, 16), (200, 0, 0, 255))
    layer.paste((0, 200, 0, 0), (0, 0, 8, 16))
    image = layer.quantize(4) if mode == "P" else layer.convert(mode)
    found = pixels(images.prepare(encoded(image, "PNG"), RULES).data)
    assert found[:, :6].min() > 235
    assert found[:, 10:].min() < 120


def test_what_is_written_again_says_nothing_about_its_origin() -> None:
    """Place, camera, profile and comment of the photographer stay behind."""
    exif = Image.Exif()
    exif[0x0110] = "camera 12345"
    exif.get_ifd(0x8825)[2] = (1.0, 2.0, 3.0)
    profile = b"profile" * 50
    options = {"exif": exif, "icc_profile": profile, "comment": b"by me", "xmp": b"<xmp/>"}
    for kind, size in (("JPEG", (200, 100)), ("PNG", (40, 30)), ("WEBP", (40, 30))):
        options_of = {k: v for k, v in options.items() if k != "comment" or kind == "JPEG"}
        data = encoded(picture(*size), kind, **options_of)
        assert b"camera 12345" in data
        prepared = images.prepare(data, RULES)
        assert not prepared.kept
        with Image.open(io.BytesIO(prepared.data)) as image:
            assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}


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


@pytest.mark.parametrize("name", [b"zTXt", b"iTXt", b"iCCP"])
def test_texts_that_unpack_to_gigabytes_are_not_unpacked(name: bytes) -> None:
    bomb = zlib.compress(bytes(30_000_000), 9)
    head = {b"zTXt": b"k\0\0", b"iTXt": b"k\0\1\0\0\0", b"iCCP": b"k\0\0"}[name]
    data = PNG[:33] + chunk(name, head + bomb) * 3 + PNG[33:]
    tracemalloc.start()
    with contextlib.suppress(BadImage):
        images.prepare(data, RULES)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


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
