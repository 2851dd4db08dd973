"""Broken, hostile and odd picture files, each with its expected verdict (-> tests of data_prep)."""

import dataclasses
import io
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from alignrec.testing.malformed import GOOD, one_of

Place = Literal[
    "file", "absent", "folder", "pipe", "device", "link_out", "link_to_text", "link_to_nothing",
    "link_to_itself", "unreadable",
]  # fmt: skip
COLOUR = (170, 90, 60)
MAX_PIXELS = 1_000_000  # what the bombs are made to exceed
MAX_BYTES = 400_000
_SIZE = (60, 44)
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
_BROKEN = one_of("image_unknown_format", "image_truncated", "image_corrupt")
_ANY = _BROKEN | {GOOD, "image_too_many_pixels", "image_too_small"}
_UNKNOWN = one_of("image_unknown_format")
_NUM_FLIPS = 8
_NUM_CUTS = 12


@dataclasses.dataclass(frozen=True)
class PictureCase:
    """One picture file.

    Attributes:
        name: unique, usable as a file name.
        verdicts: any of them is right.
        data: the file's bytes.
        place: what lies at its path, where that is no plain file.
        show_colour: decoded, it has COLOUR (about), because the damage does not touch the pixels.
    """

    name: str
    verdicts: frozenset[str]
    data: bytes = b""
    place: Place = "file"
    show_colour: bool = False


def picture_cases(seed: int = 0) -> list[PictureCase]:
    """Return every case; equal seeds give equal bytes."""
    rng = np.random.default_rng([seed, 11])
    return [
        *_cut(rng),
        *_flipped(rng),
        *_disguised(),
        *_bombs(),
        *_damaged_png(),
        *_odd_but_good(),
        *_strange_places(),
    ]


def write_picture(case: PictureCase, folder: Path) -> str:
    """Put a case where it says and return its path relative to ``folder``.

    ``folder`` gets a sibling ``outside`` that some links lead to.
    """
    path = folder / f"{case.name}.jpg"
    outside = folder.parent / "outside"
    outside.mkdir(exist_ok=True)
    (outside / "picture.jpg").write_bytes(good_picture())
    (outside / "notes.txt").write_text("no picture\n")
    makers: dict[Place, Callable[[], Any]] = {
        "file": lambda: path.write_bytes(case.data),
        "absent": lambda: None,
        "folder": path.mkdir,
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "link_out": lambda: path.symlink_to(outside / "picture.jpg"),
        "link_to_text": lambda: path.symlink_to(outside / "notes.txt"),
        "link_to_nothing": lambda: path.symlink_to(outside / "nothing.jpg"),
        "link_to_itself": lambda: path.symlink_to(path),
        "unreadable": lambda: path.write_bytes(good_picture()),
    }
    makers[case.place]()
    if case.place == "unreadable":
        path.chmod(0)
    return path.name


def good_picture(seed: int = 0) -> bytes:
    """Return a small RGB JPEG about COLOUR, other bytes for another seed."""
    return _encoded(_image(seed), "JPEG", quality=90)


def _image(seed: int = 0, size: tuple[int, int] = _SIZE) -> Image.Image:
    rough = np.random.default_rng([seed, 12]).integers(-25, 26, (5, 5, 1))
    pixels = np.clip(np.array(COLOUR) + rough - rough.mean().round(), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


def _encoded(image: Image.Image, kind: str, **options: Any) -> bytes:  # noqa: ANN401 - of Pillow
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _cut(rng: np.random.Generator) -> Iterator[PictureCase]:
    """Cut each format at the first bytes, at random and just before its end."""
    for kind in _FORMATS:
        whole = _encoded(_image(), kind)
        inside = rng.choice(np.arange(20, int(len(whole) * 0.8)), _NUM_CUTS - 4, replace=False)
        for length in sorted({1, 2, 4, 12, *inside.tolist()}):
            yield PictureCase(f"{kind}-cut-at-{length:05d}", _BROKEN, whole[:length])
        for missing in (1, 2, 7):  # decoders may forgive the loss of an end mark
            name = f"{kind}-lacks-the-last-{missing}"
            yield PictureCase(name, _BROKEN | {GOOD}, whole[:-missing])


def _flipped(rng: np.random.Generator) -> Iterator[PictureCase]:
    """Flip one bit: in the magic number, where nothing may be read, and anywhere."""
    for kind in _FORMATS:
        whole = _encoded(_image(), kind)
        yield PictureCase(f"{kind}-other-magic", _UNKNOWN, bytes([whole[0] ^ 0x10]) + whole[1:])
        for position in rng.choice(np.arange(4, len(whole)), _NUM_FLIPS, replace=False).tolist():
            changed = bytearray(whole)
            changed[position] ^= 1 << int(rng.integers(8))
            yield PictureCase(f"{kind}-bit-flipped-at-{position:05d}", _ANY, bytes(changed))


def _disguised() -> Iterator[PictureCase]:
    """Files of other kinds under the name of a picture; none of them may reach a decoder."""
    texts = {
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n",
        "pdf": b"%PDF-1.7\n1 0 obj<</Type/Catalog>>endobj\ntrailer<</Root 1 0 R>>\n%%EOF\n",
        "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "html": b"<!doctype html><title>404 Not Found</title>",
        "xml-entities": b'<!DOCTYPE a [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><a>&b;</a>',
        "text": b"no picture here\n",
        "json": b'{"error": "not found"}',
        "zip": b"PK\x03\x04" + bytes(60),
        "gzip": b"\x1f\x8b\x08" + bytes(60),
        "elf": b"\x7fELF\x02\x01\x01" + bytes(60),
        "shell": b"#!/bin/sh\nexit 1\n",
        "zeros": bytes(4096),
        "blanks": b" " * 4096,
        "noise": np.random.default_rng(13).bytes(4096),
        "photoshop": b"8BPS\x00\x01" + bytes(60),
        "icon-list": b"icns" + struct.pack(">I", 2**31 - 1) + bytes(60),
        "jpeg-start-alone": b"\xff\xd8\xff",
        "riff-without-webp": b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(20),
    }
    for name, data in texts.items():
        verdicts = _BROKEN if name == "jpeg-start-alone" else _UNKNOWN
        yield PictureCase(f"disguised-{name}", verdicts, data)
    for kind in ("TIFF", "PPM", "TGA", "ICO", "PCX", "SGI", "DDS"):  # formats that are not accepted
        yield PictureCase(f"disguised-{kind}", _UNKNOWN, _encoded(_image(), kind))
    yield PictureCase("no-bytes", one_of("image_empty"))
    yield PictureCase("too-many-bytes", one_of("image_file_too_large"), bytes(MAX_BYTES + 1))
    padded = good_picture() + bytes(MAX_BYTES)
    yield PictureCase("picture-padded-above-the-limit", one_of("image_file_too_large"), padded)


def _bombs() -> Iterator[PictureCase]:
    """Small files that claim, or would unpack to, very many pixels."""
    pixels = one_of("image_too_many_pixels")
    for side in (1200, 30_000, 65_500):
        yield PictureCase(f"bomb-png-{side}", pixels, png(side, side))
    yield PictureCase("bomb-png-wide", pixels, png(2**31 - 1, 5))
    yield PictureCase("bomb-png-of-zeros", pixels, _encoded(Image.new("1", (4000, 4000)), "PNG"))
    wide = struct.pack("<HH", 65_535, 65_535)
    gif = _encoded(_image(), "GIF")
    yield PictureCase("bomb-gif-screen", pixels, gif[:6] + wide + gif[10:])
    bmp = _encoded(_image(), "BMP")
    claimed = struct.pack("<ii", 2**30, 2**30)
    yield PictureCase("bomb-bmp-header", pixels, bmp[:18] + claimed + bmp[26:])
    jpeg = good_picture()
    frame = jpeg.index(b"\xff\xc0") + 5
    yield PictureCase(
        "bomb-jpeg-header", pixels, jpeg[:frame] + struct.pack(">HH", 65_500, 65_500)
        + jpeg[frame + 4 :],
    )  # fmt: skip
    for width, height in ((1, 1), (3, 90), (90, 1)):
        small = _encoded(_image(size=(width, height)), "PNG")
        yield PictureCase(f"too-small-{width}x{height}", one_of("image_too_small"), small)
    black = _encoded(Image.new("RGB", (400, 400)), "JPEG", progressive=True)
    scan = black[black.rindex(b"\xff\xda") : -2]
    many_scans = black[:-2] + scan * 20_000 + black[-2:]  # 12 bytes each, a pass over all pixels
    yield PictureCase("jpeg-of-20000-scans", one_of("image_corrupt"), many_scans)
    yield PictureCase("zero-wide-png", _BROKEN | {"image_too_small"}, png(0, 40))


def png(
    width: int,
    height: int,
    *,
    data: bytes = b"",
    before: bytes = b"",
    after: bytes = b"",
) -> bytes:
    """Return an RGB PNG that claims a size, whatever pixels it has."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(data or bytes(1000)))
    return b"\x89PNG\r\n\x1a\n" + header + before + pixels + after + chunk(b"IEND", b"")


def chunk(name: bytes, data: bytes) -> bytes:
    """Return one chunk of a PNG with its checksum."""
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _scanlines() -> bytes:
    width, height = _SIZE
    return (b"\x00" + bytes(COLOUR) * width) * height


def _damaged_png() -> Iterator[PictureCase]:
    """Chunks with wrong checksums, lengths, orders, and text that unpacks to very much."""
    right = png(*_SIZE, data=_scanlines())
    pixels = right.index(b"IDAT")
    wrong_sum = bytearray(right)
    wrong_sum[-20] ^= 0xFF  # within the pixels' checksum or their end
    yield PictureCase("png-pixels-checksum", _BROKEN, bytes(wrong_sum))
    header_sum = bytearray(right)
    header_sum[30] ^= 0xFF
    yield PictureCase("png-header-checksum", _BROKEN, bytes(header_sum))
    long = right[: pixels - 4] + struct.pack(">I", 2**31 - 1) + right[pixels:]
    yield PictureCase("png-chunk-of-2-GB", _BROKEN | {GOOD}, long)  # all pixels are there
    yield PictureCase("png-without-pixels", _BROKEN, right[: pixels - 4] + chunk(b"IEND", b""))
    yield PictureCase("png-too-few-pixels", _BROKEN, png(*_SIZE, data=_scanlines()[:400]))
    yield PictureCase("png-pixels-are-no-zlib", _BROKEN, right.replace(
        chunk(b"IDAT", zlib.compress(_scanlines())), chunk(b"IDAT", b"x" * 200)
    ))  # fmt: skip
    text = zlib.compress(bytes(64 << 20), 9)
    bombs = {
        "zTXt": chunk(b"zTXt", b"key\x00\x00" + text),
        "iTXt": chunk(b"iTXt", b"key\x00\x01\x00\x00\x00" + text),
        "iCCP": chunk(b"iCCP", b"name\x00\x00" + text),
    }
    for name, bomb in bombs.items():
        data = png(*_SIZE, data=_scanlines(), before=bomb)
        yield PictureCase(f"png-{name}-unpacks-to-64-MB", _BROKEN | {GOOD}, data)
    many = chunk(b"zTXt", b"key\x00\x00" + zlib.compress(bytes(1_000_000), 9)) * 100
    data = png(*_SIZE, data=_scanlines(), before=many)
    yield PictureCase("png-many-zTXt", _BROKEN | {GOOD}, data)
    more = png(*_SIZE, data=_scanlines() + bytes(8 << 20))
    yield PictureCase("png-more-pixels-than-claimed", _BROKEN | {GOOD}, more)


def _odd_but_good() -> Iterator[PictureCase]:
    """Files that are pictures all the same: their items keep them."""
    image, good = _image(), one_of(GOOD)
    other = Image.new("RGB", _SIZE, (0, 0, 255))
    animated: dict[str, Any] = {"save_all": True, "append_images": [other, image]}
    exif = Image.Exif()
    exif[0x0112] = 1
    exif[0x010E] = "x" * 500
    with_exif = _encoded(image, "JPEG", exif=exif)
    at = with_exif.index(b"Exif\x00\x00") + 6
    deep = Image.fromarray(np.full((44, 60), 128 << 8, dtype=np.uint16))
    files = {
        "animated-gif": _encoded(image, "GIF", **animated),
        "animated-webp": _encoded(image, "WEBP", **animated),
        "animated-png": _encoded(image, "PNG", **animated),
        "cmyk-jpeg": _encoded(image.convert("CMYK"), "JPEG"),
        "palette-png": _encoded(image.quantize(32), "PNG"),
        "transparent-png": _encoded(image.convert("RGBA"), "PNG"),
        "progressive-jpeg": _encoded(image, "JPEG", progressive=True),
        "exif-cut": with_exif[:at] + b"\xff" * 40 + with_exif[at + 40 :],
        "exif-endless-directory": with_exif[:at] + b"II*\x00\x08\x00\x00\x00\xff\xff"
        + with_exif[at + 10 :],
        "exif-orientation-99": _encoded(image, "JPEG", exif=_orientation(99)),
        "jpeg-with-bytes-after-its-end": good_picture() + b"<?php exit; ?>" * 20,
        "jpeg-with-a-long-comment": _encoded(image, "JPEG", comment=b"<script>" * 4000),
        "wrong-suffix-png": _encoded(image, "PNG"),
        "wrong-suffix-bmp": _encoded(image, "BMP"),
        "lossless-webp": _encoded(image, "WEBP", lossless=True),
    }  # fmt: skip
    for name, data in files.items():
        yield PictureCase(name, good, data, show_colour=True)
    yield PictureCase("grey-jpeg", good, _encoded(image.convert("L"), "JPEG"))
    yield PictureCase("16-bit-png", good, _encoded(deep, "PNG"))
    yield PictureCase("1-bit-png", good, _encoded(image.convert("1"), "PNG"))


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _strange_places() -> Iterator[PictureCase]:
    """What is no plain file; opening some of it would wait for ever."""
    unreadable = one_of("image_unreadable")
    forbidden = one_of("image_forbidden_location")  # a link that leads out of the root
    yield PictureCase("absent", one_of("image_missing"), place="absent")
    yield PictureCase("folder", unreadable, place="folder")
    yield PictureCase("pipe", unreadable, place="pipe")
    yield PictureCase("device", forbidden, place="device")
    yield PictureCase("link-to-text", forbidden, place="link_to_text")
    yield PictureCase("link-to-nothing", forbidden, place="link_to_nothing")
    yield PictureCase("link-to-itself", unreadable, place="link_to_itself")
    yield PictureCase("link-out", forbidden, place="link_out")
    may_read = os.geteuid() == 0  # to whom permissions mean nothing
    yield PictureCase("forbidden", one_of(GOOD) if may_read else unreadable, place="unreadable")
