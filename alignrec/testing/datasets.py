"""Small seeded dataset artifacts for tests, written without data_prep, for every later stage.

The catalogue has planted factors: a style that only the picture shows (colour and stripes), a topic
that only the text tells (its words); users like one style and one topic.
"""

import dataclasses
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from alignrec import artifacts
from alignrec.data import schema

NUM_STYLES = 4
NUM_TOPICS = 4
_TOPICS = (
    "garden seed flower soil bloom rose leaf spade",
    "engine wheel brake motor gear clutch tyre axle",
    "kitchen spoon recipe oven flour butter pan whisk",
    "guitar melody string chord tune piano rhythm drum",
)
_FILLERS = "the a with and for new fine small large classic simple daily"
_LIKES_PER_USER = 8


@dataclasses.dataclass(frozen=True)
class Factors:
    """What was planted.

    Attributes:
        style: per item, the factor that only the picture shows.
        topic: per item, the factor that only the text tells.
        user_style: per user, the style that the user likes.
        user_topic: per user, the topic that the user likes.
    """

    style: npt.NDArray[np.int64]
    topic: npt.NDArray[np.int64]
    user_style: npt.NDArray[np.int64]
    user_topic: npt.NDArray[np.int64]


def write_dataset(
    folder: Path,
    *,
    num_items: int = 48,
    num_users: int = 24,
    seed: int = 0,
    image_size: int = 32,
    samples_per_shard: int = 16,
    without_image: tuple[int, ...] = (),
    without_text: tuple[int, ...] = (),
    removed: tuple[int, ...] = (),
    idle_users: tuple[int, ...] = (),
    texts: Sequence[str] | None = None,
) -> Path:
    """Write a finished dataset artifact to ``folder`` and return the folder.

    Args:
        folder: the artifact; an older one there is replaced.
        num_items: items 0..num_items - 1, all but the removed ones with a sample.
        num_users: users; each has 8 interactions (fewer items: fewer), 6 train, 1 valid, 1 test.
        seed: equal arguments give equal bytes of tables and shards.
        image_size: side of the square JPEGs in pixels.
        samples_per_shard: items in one tar.
        without_image: item_index of items that have no picture.
        without_text: item_index of items whose title and text are empty.
        removed: item_index of items of an earlier version: a row of the table and nothing else.
        idle_users: user_index of users without any interaction.
        texts: of the items, instead of a few words of their topics.
    """
    factors = draw_factors(num_items=num_items, num_users=num_users, seed=seed)
    settings = {"num_items": num_items, "num_users": num_users, "seed": seed, "size": image_size}
    mark = artifacts.fingerprint("testing", 1, settings, {})
    with artifacts.writing(
        folder, kind="dataset", fingerprint=mark, config=settings, inputs={}
    ) as draft:
        rng = np.random.default_rng([seed, 1])
        texts = texts or [
            "" if i in without_text else _text(rng, int(factors.topic[i])) for i in range(num_items)
        ]
        pictures = [
            b"" if i in without_image else _picture(rng, int(factors.style[i]), image_size)
            for i in range(num_items)
        ]
        _write_items(draft.path, texts, pictures, removed)
        _write_users(draft.path, num_users)
        samples = [(i, texts[i], pictures[i]) for i in range(num_items) if i not in removed]
        num_shards = _write_shards(draft.path, samples, samples_per_shard)
        pairs = _draw_pairs(factors, np.random.default_rng([seed, 2]), removed, idle_users)
        sizes = _write_interactions(draft.path, pairs)
        pq.write_table(schema.QUARANTINE.empty_table(), draft.path / "quarantine.parquet")
        draft.counts |= {
            "num_items": num_items,
            "num_users": num_users,
            "num_shards": num_shards,
            "num_without_image": sum(not picture for _, _, picture in samples),
            "num_without_text": sum(not text for _, text, _ in samples),
            "num_quarantined": 0,
            **sizes,
        }
    return folder


def draw_factors(*, num_items: int, num_users: int, seed: int) -> Factors:
    """Return the factors that ``write_dataset`` plants for these arguments."""
    rng = np.random.default_rng([seed, 0])
    return Factors(
        style=rng.integers(NUM_STYLES, size=num_items),
        topic=rng.integers(NUM_TOPICS, size=num_items),
        user_style=rng.integers(NUM_STYLES, size=num_users),
        user_topic=rng.integers(NUM_TOPICS, size=num_users),
    )


def _text(rng: np.random.Generator, topic: int) -> str:
    own = rng.choice(_TOPICS[topic].split(), size=8)
    filler = rng.choice(_FILLERS.split(), size=8)
    return " ".join(word for pair in zip(own, filler, strict=True) for word in pair)


def _picture(rng: np.random.Generator, style: int, size: int) -> bytes:
    """Return a JPEG of stripes: the style decides their direction, width and colour."""
    y, x = np.mgrid[0:size, 0:size] / size
    angle = np.pi * style / NUM_STYLES
    wave = np.sin((4 + 2 * style) * np.pi * (x * np.cos(angle) + y * np.sin(angle) + rng.random()))
    colour = np.array([[220, 60, 40], [40, 180, 70], [50, 80, 220], [230, 200, 50]])[style]
    pixels = 128 + (colour - 128) * (0.5 + 0.5 * wave[..., None])
    pixels = pixels + rng.normal(0, 6, size=(size, size, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=90)
    return file.getvalue()


def _write_items(
    folder: Path, texts: Sequence[str], pictures: list[bytes], removed: tuple[int, ...]
) -> None:
    gone = np.isin(np.arange(len(texts)), removed)
    columns = {
        "item_index": pa.array(range(len(texts)), pa.int64()),
        "item_key": [f"item-{i}" for i in range(len(texts))],
        "title": [" ".join(text.split()[:2]) for text in texts],
        "text": texts,
        "has_image": np.array([bool(picture) for picture in pictures]) & ~gone,
        "has_text": np.array([bool(text) for text in texts]) & ~gone,
        "removed": gone,
    }
    pq.write_table(pa.table(columns, schema=schema.ITEMS), folder / "items.parquet")


def _write_users(folder: Path, num_users: int) -> None:
    columns = {
        "user_index": pa.array(range(num_users), pa.int64()),
        "user_key": [f"user-{u}" for u in range(num_users)],
    }
    pq.write_table(pa.table(columns, schema=schema.USERS), folder / "users.parquet")


def _write_shards(
    folder: Path, samples: list[tuple[int, str, bytes]], samples_per_shard: int
) -> int:
    (folder / "shards").mkdir(exist_ok=True)
    rows = []
    starts = range(0, len(samples), samples_per_shard)
    for start in starts:
        content, offsets = _tar(samples[start : start + samples_per_shard])
        name = f"shards/{hashlib.sha256(content).hexdigest()[:16]}.tar"
        (folder / name).write_bytes(content)
        rows += [{"shard": name, **row} for row in offsets]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema.SAMPLES), folder / "samples.parquet")
    return len(starts)


def _tar(samples: list[tuple[int, str, bytes]]) -> tuple[bytes, list[dict[str, int]]]:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for item_index, text, picture in samples:
            title = " ".join(text.split()[:2])
            content = {"item_key": f"item-{item_index}", "title": title, "text": text}
            members = [("jpg", picture)] if picture else []
            members.append(("json", json.dumps({**content, "attributes": {}}).encode()))
            for suffix, payload in members:
                member = tarfile.TarInfo(f"{item_index:012d}.{suffix}")
                member.size = len(payload)
                tar.addfile(member, io.BytesIO(payload))
    content_bytes = file.getvalue()
    rows: dict[int, dict[str, int]] = {}
    with tarfile.open(fileobj=io.BytesIO(content_bytes)) as tar:
        for member in tar:
            stem, _, suffix = member.name.partition(".")
            empty = {"item_index": int(stem), "image_offset": 0, "image_bytes": 0, "crc32": 0}
            row = rows.setdefault(int(stem), empty)
            prefix = "image" if suffix == "jpg" else "json"
            row[f"{prefix}_offset"], row[f"{prefix}_bytes"] = member.offset_data, member.size
            payload = content_bytes[member.offset_data : member.offset_data + member.size]
            row["crc32"] = zlib.crc32(payload, row["crc32"])  # the picture comes first
    return content_bytes, list(rows.values())


def _draw_pairs(
    factors: Factors,
    rng: np.random.Generator,
    removed: tuple[int, ...],
    idle_users: tuple[int, ...],
) -> dict[schema.Split, list[tuple[int, int]]]:
    """Draw each user's items by taste and deal them out: last to test, one before to valid."""
    pairs: dict[schema.Split, list[tuple[int, int]]] = {"train": [], "valid": [], "test": []}
    num_items = len(factors.style)
    for user in range(len(factors.user_style)):
        taste = 3.0 * (factors.style == factors.user_style[user])
        taste += 3.0 * (factors.topic == factors.user_topic[user])
        noisy = taste + rng.gumbel(size=num_items)
        noisy[list(removed)] = -np.inf
        liked = np.argsort(-noisy)[: min(_LIKES_PER_USER, num_items - len(removed))]
        liked = rng.permutation(liked)
        if user in idle_users:
            continue
        pairs["train"] += [(user, int(i)) for i in liked[:-2]]
        pairs["valid"].append((user, int(liked[-2])))
        pairs["test"].append((user, int(liked[-1])))
    return pairs


def _write_interactions(
    folder: Path, pairs: dict[schema.Split, list[tuple[int, int]]]
) -> dict[str, int]:
    (folder / "interactions").mkdir(exist_ok=True)
    for split, rows in pairs.items():
        rows.sort()
        columns = {
            "user_index": pa.array([u for u, _ in rows], pa.int64()),
            "item_index": pa.array([i for _, i in rows], pa.int64()),
            "rating": pa.nulls(len(rows), pa.float32()),
            "timestamp": pa.nulls(len(rows), pa.int64()),
        }
        table = pa.table(columns, schema=schema.INTERACTIONS)
        pq.write_table(table, schema.interactions_path(folder, split))
    return {f"num_{split}": len(rows) for split, rows in pairs.items()}
