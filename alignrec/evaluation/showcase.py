"""A few users as a person would look at them: pictures of what they liked and what is recommended.

Everything is read by filters and byte offsets, so a large dataset costs no more than a small one.
"""

import base64
import dataclasses
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.evaluation.config import ReportConfig
from alignrec.evaluation.ranking import NO_ITEM, ScoreFunction, rank_blocks


@dataclasses.dataclass(frozen=True)
class Thumbnail:
    """A small JPEG as a data: URI, with its size in pixels."""

    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Tile:
    """One item as it is shown: with its picture, or its title alone."""

    title: str
    thumbnail: Thumbnail | None
    is_hit: bool = False


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """An item that the user really chose later, and the place that the model gave it."""

    title: str
    rank: int
    is_shown: bool


@dataclasses.dataclass(frozen=True)
class ShownUser:
    """A user's history, recommendations and held-out items."""

    key: str
    num_train: int
    history: tuple[Tile, ...]
    recommended: tuple[Tile, ...]
    held_out: tuple[HeldOut, ...]


def choose_users(train: CSR, held_out: CSR, config: ReportConfig) -> list[int]:
    """Return users evenly spread over those with enough history, whatever their results."""
    enough = (train.row_lengths >= config.min_history) & (held_out.row_lengths > 0)
    eligible = enough.nonzero().squeeze(1).tolist()
    count = min(config.num_users, len(eligible))
    return [eligible[(2 * i + 1) * len(eligible) // (2 * count)] for i in range(count)]


def show_users(
    dataset: Path,
    train: CSR,
    held_out: CSR,
    scores: ScoreFunction,
    config: ReportConfig,
    *,
    removed: Int64[Tensor, " num_removed"],
) -> list[ShownUser]:
    """Rank for the chosen users and collect titles and pictures of all that is shown of them."""
    users = choose_users(train, held_out, config)
    if not users:
        return []
    histories = read_histories(dataset, users)
    ranked = {}
    for block, items, _ in rank_blocks(
        scores,
        users=torch.tensor(users),
        seen=train,
        removed=removed,
        k=train.num_cols,
        block_users=1,
    ):
        ranked[int(block)] = items[0][items[0] != NO_ITEM].cpu()
    truth = {user: set(held_out.row(user).tolist()) for user in users}
    recommended = {user: ranked[user][: config.recommendations].tolist() for user in users}
    shown = {
        item for user in users for item in (*histories[user][: config.history], *recommended[user])
    }
    titles = read_titles(dataset, shown.union(*truth.values()))
    pictures = read_thumbnails(dataset, shown, config.thumbnail_side)
    keys = read_user_keys(dataset, users)

    def tile(item: int, user: int) -> Tile:
        return Tile(titles[item], pictures.get(item), item in truth[user])

    return [
        ShownUser(
            key=keys[user],
            num_train=len(histories[user]),
            history=tuple(tile(item, user) for item in histories[user][: config.history]),
            recommended=tuple(tile(item, user) for item in recommended[user]),
            held_out=_places(truth[user], ranked[user].numpy(), titles, config.recommendations),
        )
        for user in users
    ]


def read_histories(dataset: Path, users: Sequence[int]) -> dict[int, list[int]]:
    """Return the training items of each user, newest first where times are known."""
    table = schema.read_table(
        schema.interactions_path(dataset, "train"), filters=[("user_index", "in", users)]
    )
    histories: dict[int, list[int]] = {user: [] for user in users}
    for row in sorted(table.to_pylist(), key=lambda r: (-(r["timestamp"] or 0), r["item_index"])):
        histories[row["user_index"]].append(row["item_index"])
    return histories


def read_titles(dataset: Path, items: Iterable[int]) -> dict[int, str]:
    """Return the title of each item; its key where it has none."""
    table = schema.read_table(
        dataset / "items.parquet",
        columns=["item_index", "item_key", "title"],
        filters=[("item_index", "in", sorted(items))],
    )
    return {row["item_index"]: row["title"] or row["item_key"] for row in table.to_pylist()}


def read_user_keys(dataset: Path, users: Sequence[int]) -> dict[int, str]:
    """Return the key of each user."""
    table = schema.read_table(dataset / "users.parquet", filters=[("user_index", "in", users)])
    return {row["user_index"]: row["user_key"] for row in table.to_pylist()}


def read_thumbnails(dataset: Path, items: Iterable[int], side: int) -> dict[int, Thumbnail]:
    """Return a small picture of each item that has one that can be decoded.

    Args:
        dataset: the dataset artifact; the bytes are read from its shards by their offsets.
        items: item_index of the items wanted.
        side: longer side, pixels.
    """
    path = dataset / "samples.parquet"
    if not path.exists():
        return {}
    table = schema.read_table(path, filters=[("item_index", "in", sorted(items))])
    pictures = {}
    for row in table.to_pylist():
        if row["image_bytes"] == 0:
            continue
        with (dataset / row["shard"]).open("rb") as shard:
            shard.seek(row["image_offset"])
            thumbnail = _shrink(shard.read(row["image_bytes"]), side)
        if thumbnail is not None:
            pictures[row["item_index"]] = thumbnail
    return pictures


def encode_picture(image: Image.Image) -> Thumbnail:
    """Return the picture as a JPEG in a data: URI."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "JPEG", quality=78, optimize=True)
    text = base64.b64encode(file.getvalue()).decode("ascii")
    return Thumbnail(f"data:image/jpeg;base64,{text}", image.width, image.height)


def _shrink(payload: bytes, side: int) -> Thumbnail | None:
    try:
        with Image.open(io.BytesIO(payload)) as image:
            image.draft("RGB", (side, side))  # decodes a large JPEG at a fraction of its size
            image.thumbnail((side, side))
            return encode_picture(image)
    except (OSError, ValueError, Image.DecompressionBombError):
        return None  # the page shows the title instead


def _places(
    truth: set[int], ranked: npt.NDArray[np.int64], titles: dict[int, str], shown: int
) -> tuple[HeldOut, ...]:
    rank = {int(item): place for place, item in enumerate(ranked, start=1)}
    places = sorted((rank[item], item) for item in truth if item in rank)
    return tuple(HeldOut(titles[item], place, place <= shown) for place, item in places)
