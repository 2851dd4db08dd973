"""One shard: a chunk of the catalogue in, a WebDataset tar and its tables out (one Ray task).

A tar is a function of its samples alone: fixed times and owners in its headers, samples in
item_index order, its name the beginning of its SHA-256. So any number of workers, and any number of
attempts, write the same bytes.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import tarfile
import uuid
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.artifacts import write_json
from alignrec.data import schema
from data_prep import images, texts
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules, Picture
from data_prep.quarantine import make_table
from data_prep.statistics import Tally

SHARDS = "shards"
TITLE = "title"
TEXT_PREFIX = "text:"  # keeps a text column called "title" or "image" apart from the fixed ones
_NAME_DIGITS = 16


@dataclasses.dataclass(frozen=True)
class TextRules:
    """How a text is made; see ``TextConfig`` for the fields."""

    separator: str
    max_title_characters: int
    max_column_characters: int


@dataclasses.dataclass(frozen=True)
class ShardPlan:
    """What every shard task needs beside the number of its chunk.

    Attributes:
        artifact: folder of the draft, reachable from every host.
        work: folder of what must survive a kill.
    """

    artifact: Path
    work: Path
    images: ImageRules
    text: TextRules
    read_threads: int

    def chunk_path(self, chunk: int) -> Path:
        """Return where the rows of a chunk lie."""
        return self.work / "catalogue" / f"{chunk:06d}.parquet"

    def part_path(self, chunk: int, table: str) -> Path:
        """Return where a chunk's share of a table lies."""
        return self.work / "parts" / f"{chunk:06d}.{table}.parquet"

    def done_path(self, chunk: int) -> Path:
        """Return the mark of a finished chunk, written last."""
        return self.work / "parts" / f"{chunk:06d}.json"

    def is_done(self, chunk: int) -> bool:
        """Say whether the chunk's shard and tables are complete."""
        return self.done_path(chunk).exists()

    def read_done(self, chunk: int) -> dict[str, Any]:
        """Return what the mark of a finished chunk says: its summary and its tally."""
        content: dict[str, Any] = json.loads(self.done_path(chunk).read_text())
        return content


@dataclasses.dataclass(frozen=True)
class Placed:
    """Where a payload lies in the tar, in bytes."""

    offset: int
    size: int


class TarWriter:
    """Writes a tar that depends on nothing but the members given to it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._spare = folder / f".{uuid.uuid4().hex}.writing"
        self._hash = hashlib.sha256()
        self._position = 0

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._file = self._spare.open("wb")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._spare.unlink(missing_ok=True)

    def add(self, name: str, data: bytes) -> Placed:
        """Append one member and return where its payload lies."""
        header = tarfile.TarInfo(name)
        header.size, header.mode, header.mtime = len(data), 0o644, 0
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        placed = Placed(self._position, len(data))
        self._write(data)
        self._write(bytes(-len(data) % tarfile.BLOCKSIZE))
        return placed

    def finish(self) -> str:
        """End the tar, move it to the name made of its digest and return that name."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))
        self._write(bytes(-self._position % tarfile.RECORDSIZE))
        self._file.flush()
        os.fsync(self._file.fileno())
        name = f"{self._hash.hexdigest()[:_NAME_DIGITS]}.tar"
        self._spare.replace(self._folder / name)
        return name

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._position += len(data)


def write_shard(row: Mapping[str, Any], plan: ShardPlan) -> dict[str, Any]:
    """Make the shard of one chunk, unless that is done already.

    Args:
        row: {"chunk": number of the chunk}.
        plan: what is the same for all chunks.

    Returns:
        {"chunk", "num_items", "num_bad_images"}.
    """
    chunk = int(row["chunk"])
    if not plan.is_done(chunk):
        _write_shard(chunk, plan)
    summary: dict[str, Any] = plan.read_done(chunk)["summary"]
    return summary


def _write_shard(chunk: int, plan: ShardPlan) -> None:
    rows = pq.read_table(plan.chunk_path(chunk)).to_pylist()
    items: list[dict[str, Any]] = []
    samples: list[dict[str, Any]] = []
    bad: list[tuple[str, BadImage]] = []
    tally = Tally()
    with TarWriter(plan.artifact / SHARDS) as tar:
        for row, loaded in _with_pictures(rows, plan):
            picture = loaded if isinstance(loaded, Picture) else None
            if isinstance(loaded, BadImage):
                bad.append((row["item_key"], loaded))
            sample = _sample_text(row, plan.text)
            samples.append(_add_sample(tar, row["item_index"], sample, picture))
            items.append(_item_row(row, sample, picture))
            tally.add(picture, sample["text"], declared=row["image"] is not None)
        name = tar.finish()
    for sample_row in samples:
        sample_row |= {"shard": f"{SHARDS}/{name}", "image_source": ""}
    tables = {
        "items": pa.Table.from_pylist(items, schema.ITEMS),
        "samples": pa.Table.from_pylist(samples, schema.SAMPLES),
        "quarantine": make_table(
            "images",
            [key for key, _ in bad],
            [verdict.reason for _, verdict in bad],
            [verdict.detail for _, verdict in bad],
        ),
    }
    plan.done_path(chunk).parent.mkdir(parents=True, exist_ok=True)
    for table_name, table in tables.items():
        _write_table(plan.part_path(chunk, table_name), table)
    summary = {
        "chunk": chunk,
        "num_items": len(items),
        "num_bad_images": len(bad),
    }
    write_json(plan.done_path(chunk), {"summary": summary, "tally": dataclasses.asdict(tally)})


def _with_pictures(
    rows: list[dict[str, Any]], plan: ShardPlan
) -> Iterator[tuple[dict[str, Any], Picture | BadImage | None]]:
    """Yield every row with its picture; files are read ahead, decoding is on this thread."""
    with Fetcher(plan.images) as fetcher, ThreadPoolExecutor(plan.read_threads) as pool:
        waiting: deque[Future[bytes | BadImage | None]] = deque()
        ahead = iter(rows)

        def read_next() -> None:
            row = next(ahead, None)
            if row is not None:
                waiting.append(pool.submit(_read, row["image"], fetcher))

        for _ in range(2 * plan.read_threads):
            read_next()
        for row in rows:
            data = waiting.popleft().result()
            read_next()
            yield row, _prepared(data, plan.images) if isinstance(data, bytes) else data


def _read(reference: str | None, fetcher: Fetcher) -> bytes | BadImage | None:
    if reference is None:
        return None
    try:
        return fetcher.read(reference)
    except BadImage as verdict:
        return verdict


def _prepared(data: bytes, rules: ImageRules) -> Picture | BadImage:
    try:
        return images.prepare(data, rules)
    except BadImage as verdict:
        return verdict


def _sample_text(row: Mapping[str, Any], rules: TextRules) -> dict[str, Any]:
    """Return the sample's JSON: key, title, text, and the cleaned text columns by name."""
    title = texts.clean(row[TITLE], max_characters=rules.max_title_characters)
    parts = {
        name.removeprefix(TEXT_PREFIX): texts.clean(
            value, max_characters=rules.max_column_characters
        )
        for name, value in row.items()
        if name.startswith(TEXT_PREFIX)
    }
    return {
        "item_key": row["item_key"],
        "title": title,
        "text": texts.join(parts.values(), separator=rules.separator),
        "attributes": {name: part for name, part in parts.items() if part},
    }


def _add_sample(
    tar: TarWriter, item_index: int, sample: Mapping[str, Any], picture: Picture | None
) -> dict[str, Any]:
    key = f"{item_index:012d}"
    image = Placed(0, 0) if picture is None else tar.add(f"{key}.jpg", picture.data)
    document = json.dumps(sample, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    text = tar.add(f"{key}.json", document.encode())
    return {
        "item_index": item_index,
        "image_offset": image.offset,
        "image_bytes": image.size,
        "json_offset": text.offset,
        "json_bytes": text.size,
    }


def _item_row(
    row: Mapping[str, Any], sample: Mapping[str, Any], picture: Picture | None
) -> dict[str, Any]:
    return {
        "item_index": row["item_index"],
        "item_key": row["item_key"],
        "title": sample["title"],
        "text": sample["text"],
        "has_image": picture is not None,
        "has_text": bool(sample["text"]),
        "removed": False,
    }


def _write_table(path: Path, table: pa.Table) -> None:
    spare = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    with contextlib.ExitStack() as stack:
        stack.callback(spare.unlink, missing_ok=True)
        pq.write_table(table, spare)
        spare.replace(path)
