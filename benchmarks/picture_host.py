"""Pictures like photographs, drawn by seeded code, and a web host on this machine that serves them.

python benchmarks/picture_host.py FOLDER   (prints its port; every number.jpg is another file)
"""

import asyncio
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

PHOTOGRAPHS = ((640, 480), (800, 600), (600, 800), (1024, 768), (1200, 900), (900, 1200))
THUMBNAILS = ((160, 120), (120, 160))


def draw(folder: Path, *, num: int, sizes: Sequence[tuple[int, int]], seed: int = 0) -> list[Path]:
    """Draw ``num`` pictures, unless they are there; return their files."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:05d}.jpg" for number in range(num)]
    for number, path in enumerate(paths):
        if not path.exists():
            rng = np.random.default_rng((seed, number))
            spare = path.with_suffix(".writing")
            spare.write_bytes(_photograph(rng, sizes[number % len(sizes)]))
            spare.replace(path)
    return paths


def _photograph(rng: np.random.Generator, size: tuple[int, int]) -> bytes:
    """Structure of all sizes, the smaller the weaker, with some sharp edges."""
    total = np.full((size[1], size[0], 3), 128.0, dtype=np.float32)
    for octave in range(9):
        cells = rng.integers(0, 256, (3 << octave, 4 << octave, 3), dtype=np.uint8)
        layer = Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)
        total += (np.asarray(layer, dtype=np.float32) - 128.0) * 0.6 ** (octave + 1)
    image = Image.fromarray(total.clip(0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(8):
        x, y = rng.integers(0, size[0]), rng.integers(0, size[1])
        width, height = rng.integers(10, max(11, size[0] // 4), 2)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        pen.ellipse((x, y, x + width, y + height), fill=colour)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return buffer.getvalue()


def numbered(data: bytes, number: int) -> bytes:
    """Return a JPEG with a comment of its own, so that no two files are the same bytes."""
    comment = b"%012d" % number
    return data[:2] + b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment + data[2:]


class _Connection(asyncio.Protocol):
    """As little of a web host as a fair comparison needs."""

    def __init__(self, pictures: Sequence[bytes]) -> None:
        self._pictures = pictures
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._pending += data
        while b"\r\n\r\n" in self._pending:
            head, self._pending = self._pending.split(b"\r\n\r\n", 1)
            self._answer(head)

    def _answer(self, head: bytes) -> None:
        number = int(head.split(b" ", 2)[1].strip(b"/").removesuffix(b".jpg"))
        body = numbered(self._pictures[number % len(self._pictures)], number)
        closing = b"connection: close" in head.lower()
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n%s\r\n"
            % (len(body), b"Connection: close\r\n" if closing else b"")
            + body
        )
        if closing:
            self._transport.close()


async def _serve(folder: Path) -> None:
    pictures = [path.read_bytes() for path in sorted(folder.glob("*.jpg"))]
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(pictures), "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1])))
