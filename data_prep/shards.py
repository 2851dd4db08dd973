"""One shard: a chunk of the catalogue in, a WebDataset tar and its tables out (one Ray task).

A chunk that is what it was in the version before shares that one's shard; in a chunk that changed,
pictures that did not keep their bytes. Either way the bytes are those that a first run would write.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import uuid
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from alignrec.artifacts import write_json
from alignrec.data import schema
from data_prep import pictures, texts
from data_prep.images import BadImage, Picture
from data_prep.pictures import IMAGE, IMAGE_BYTES, Earlier, Loaded, PictureRules
from data_prep.quarantine import clean_detail
from data_prep.reuse import PICTURES, Attempt, Base, Chunk, chunk_digest, open_base
from data_prep.statistics import Tally
from data_prep.tars import SHARDS, FinishedTar, Placed, TarWriter

TITLE = "title"
REMOVED = "removed"
TEXT_PREFIX = "text:"  # keeps a text column called "title" or "image" apart from the fixed ones
_JSON = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"))
TABLES = {"items": schema.ITEMS, "samples": schema.SAMPLES, "pictures": PICTURES}


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
        pictures: how pictures are read and prepared.
        text: how texts are made.
        base: the version whose shards and pictures are used again where nothing changed.
    """

    artifact: Path
    work: Path
    pictures: PictureRules
    text: TextRules
    base: Path | None = None

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

    def read_done(self, chunk: int) -> tuple[Chunk, dict[str, Any]]:
        """Return what the mark of a finished chunk says: the chunk and how it was made."""
        content = json.loads(self.done_path(chunk).read_text())
        return Chunk(**content["chunk"]), content["summary"]

    def read_part(self, chunk: Chunk, table: str) -> pa.Table:
        """Return a finished chunk's rows of a table of TABLES."""
        path = self.part_path(chunk.chunk, table)
        if path.exists():
            return pq.read_table(path, schema=TABLES[table])
        base = self.open_base()
        assert base is not None, f"{path}: a finished chunk without its rows"
        return base.rows(table, chunk.first_item, chunk.first_item + chunk.num_items)

    def open_base(self) -> Base | None:
        """Return the tables of the version before."""
        return None if self.base is None else open_base(self.base)

    def taken_back_path(self, chunk: int, name: str) -> Path:
        """Return where a file of a chunk lies that was finished and is made again."""
        return self.work / "again" / f"{chunk:06d}.{name}"

    def taken_back(self, chunk: int) -> Attempt | None:
        """Return what a chunk had before ``take_back``."""
        mark = self.taken_back_path(chunk, "json")
        if not mark.exists():
            return None
        made = Chunk(**json.loads(mark.read_text())["chunk"])
        parts = {name: self.taken_back_path(chunk, f"{name}.parquet") for name in TABLES}
        return Attempt(self.artifact, made, parts)


def write_shard(row: Mapping[str, Any], plan: ShardPlan) -> dict[str, Any]:
    """Make the shard of one chunk, or share that of the base, unless that is done already.

    Args:
        row: {"chunk": number of the chunk}.
        plan: what is the same for all chunks.

    Returns:
        {"chunk", "num_items", "num_bad_images", "bad": reason -> number of new verdicts, "bytes",
        "linked": the base's shard is shared, "kept" and "fetched": numbers of pictures, "damaged":
        shards of the base that are not what their checksum says}.
    """
    number = int(row["chunk"])
    if not plan.is_done(number):
        rows = pq.read_table(plan.chunk_path(number))
        sources = pictures.sources(rows, plan.pictures)
        plan.done_path(number).parent.mkdir(parents=True, exist_ok=True)
        damaged: list[str] = []
        if not _share_chunk(number, rows, sources, plan, damaged):
            _make_chunk(number, rows, sources, plan, damaged)
    return plan.read_done(number)[1]


def may_become_better(number: int, plan: ShardPlan) -> bool:
    """Say whether a picture that was bad when a chunk was finished may be good by now."""
    chunk, _ = plan.read_done(number)
    if not chunk.num_bad_images:
        return False
    listed = plan.read_part(chunk, "pictures")
    bad = listed.filter(pc.not_equal(listed["reason"], ""))
    before: list[str] = bad["source"].to_pylist()
    if "" in before:
        return True
    columns = ["item_index", IMAGE, IMAGE_BYTES]
    rows = pq.read_table(plan.chunk_path(number), columns=columns)
    rows = rows.filter(pc.is_in(rows["item_index"], bad["item_index"]))
    return pictures.sources(rows, plan.pictures) != before


def take_back(number: int, plan: ShardPlan) -> None:
    """Make a finished chunk unfinished; its good pictures are used again like those of a base."""
    mark = plan.taken_back_path(number, "json")
    mark.parent.mkdir(parents=True, exist_ok=True)
    mark.unlink(missing_ok=True)
    if not plan.part_path(number, "items").exists():  # linked: the base has all of it
        plan.done_path(number).unlink()
        return
    for name in TABLES:
        copy = plan.taken_back_path(number, f"{name}.parquet")
        shutil.copyfile(plan.part_path(number, name), copy)
    plan.done_path(number).replace(mark)


def _share_chunk(
    number: int, rows: pa.Table, sources: list[str], plan: ShardPlan, damaged: list[str]
) -> bool:
    """Take the base's shard as it is, if it would become the same; say whether that was so."""
    base = plan.open_base()
    known = None if base is None else base.chunk(number)
    if base is None or known is None or known.digest != _digest(rows, sources, plan):
        return False
    if known.shard and not _share_shard(base, known, plan.artifact / known.shard):
        damaged.append(known.shard)
        return False
    for name in TABLES:  # of a stopped attempt, whose rows may be others
        plan.part_path(number, name).unlink(missing_ok=True)
    _write_done(plan, known, linked=True)
    return True


def _share_shard(base: Base, known: Chunk, target: Path) -> bool:
    """Give a shard of the base a second name, or copy it; False where it is damaged."""
    source = base.folder / known.shard
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if source.stat().st_size != known.bytes:
            return False
        os.link(source, target)
    except FileNotFoundError:
        return False
    except FileExistsError:
        return True  # an attempt that was killed had come this far
    except OSError:  # no hard links here, or too many of this file
        content = pictures.read_verified(base, known.shard)
        if content is None:
            return False
        with _replacing(target) as spare:
            spare.write_bytes(content)
    return True


def _share_equal(base: Base, shard: FinishedTar, target: Path) -> None:
    """Replace a shard that came out as one of the base's by that file: it takes no space then.

    So it is where pictures were touched or failed again and nothing else changed.
    """
    known = base.chunk_of(shard.path)
    if known is None or pictures.read_verified(base, known.shard) is None:
        return
    with contextlib.suppress(OSError), _replacing(target) as spare:
        os.link(base.folder / known.shard, spare)


def _make_chunk(
    number: int, rows: pa.Table, sources: list[str], plan: ShardPlan, damaged: list[str]
) -> None:
    """Write a chunk's shard and tables; pictures that did not change keep their bytes."""
    listed = rows.to_pylist()
    base = plan.open_base()
    first, end = listed[0]["item_index"], listed[-1]["item_index"] + 1
    source = plan.taken_back(number) or base
    earlier = None if source is None or not any(sources) else Earlier(source, first, end)
    parts = _Parts()
    with TarWriter(plan.artifact / SHARDS) as tar:
        for row, loaded in zip(
            listed, pictures.load(listed, sources, plan.pictures, earlier), strict=True
        ):
            parts.add(row, loaded, plan.text, tar)
        shard = tar.finish() if parts.samples else FinishedTar("", 0, "")
    if base is not None and parts.samples:
        _share_equal(base, shard, plan.artifact / shard.path)
    for sample in parts.samples:
        sample["shard"] = shard.path
    for name, kind in TABLES.items():
        with _replacing(plan.part_path(number, name)) as spare:
            pq.write_table(pa.Table.from_pylist(getattr(parts, name), kind), spare)
    recorded = {row["item_index"]: row["source"] for row in parts.pictures}
    chunk = Chunk(
        chunk=number,
        digest=_digest(rows, [recorded.get(row["item_index"], "") for row in listed], plan),
        first_item=first,
        num_items=len(listed),
        num_samples=len(parts.samples),
        num_bad_images=sum(bool(row["reason"]) for row in parts.pictures),
        shard=shard.path,
        bytes=shard.size,
        sha256=shard.sha256,
        tally=json.dumps(dataclasses.asdict(parts.tally)),
    )
    _write_done(
        plan,
        chunk,
        bad=dict(parts.bad),
        kept=parts.num_kept,
        fetched=len(parts.pictures) - parts.num_kept,
        damaged=sorted({*damaged, *(earlier.damaged if earlier else [])}),
    )


def _digest(rows: pa.Table, sources: list[str], plan: ShardPlan) -> str:
    rules = dataclasses.asdict(plan.text)
    return chunk_digest(rows.drop_columns([IMAGE_BYTES]), sources, [rules])


def _write_done(
    plan: ShardPlan,
    chunk: Chunk,
    *,
    linked: bool = False,
    bad: Mapping[str, int] | None = None,
    kept: int = 0,
    fetched: int = 0,
    damaged: list[str] | None = None,
) -> None:
    summary = {
        "chunk": chunk.chunk,
        "num_items": chunk.num_items,
        "num_bad_images": chunk.num_bad_images,
        "bad": dict(bad or {}),
        "bytes": chunk.bytes,
        "linked": linked,
        "kept": kept,
        "fetched": fetched,
        "damaged": damaged or [],
    }
    content = {"summary": summary, "chunk": dataclasses.asdict(chunk)}
    write_json(plan.done_path(chunk.chunk), content)


@dataclasses.dataclass
class _Parts:
    """A chunk's rows of the tables, while its shard is written."""

    items: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    samples: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    pictures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    tally: Tally = dataclasses.field(default_factory=Tally)
    bad: Counter[str] = dataclasses.field(default_factory=Counter)
    num_kept: int = 0

    def add(self, row: Mapping[str, Any], loaded: Loaded, rules: TextRules, tar: TarWriter) -> None:
        """Add one item; a removed one has a row and nothing else."""
        if row[REMOVED]:
            self.items.append(_removed_row(row))
            return
        picture = loaded.verdict if isinstance(loaded.verdict, Picture) else None
        document = _sample_text(row, rules)
        self.samples.append(_add_sample(tar, row["item_index"], document, picture))
        self.items.append(_item_row(row, document, picture))
        self.tally.add(picture, document["text"], declared=loaded.verdict is not None)
        if loaded.verdict is not None:
            picture_row = _picture_row(loaded.verdict)
            picture_row |= {"item_index": row["item_index"], "source": loaded.source}
            self.pictures.append(picture_row)
            self.num_kept += loaded.is_kept
        if isinstance(loaded.verdict, BadImage) and not loaded.is_kept:
            self.bad[loaded.verdict.reason.value] += 1


def _picture_row(verdict: Picture | BadImage) -> dict[str, Any]:
    if isinstance(verdict, BadImage):
        nothing = {"width": 0, "height": 0, "kept": False, "animated": False}
        detail = clean_detail(verdict.detail)
        return {**nothing, "reason": verdict.reason.value, "detail": detail}
    fields = ("width", "height", "kept", "animated")
    return {**{name: getattr(verdict, name) for name in fields}, "reason": "", "detail": ""}


def _removed_row(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "item_index": row["item_index"],
        "item_key": row["item_key"],
        "title": "",
        "text": "",
        "has_image": False,
        "has_text": False,
        "removed": True,
    }


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
    data, document = b"" if picture is None else picture.data, _JSON.encode(sample).encode()
    image = tar.add(f"{key}.jpg", data) if data else Placed(0, 0)
    text = tar.add(f"{key}.json", document)
    return {
        "item_index": item_index,
        "image_offset": image.offset,
        "image_bytes": image.size,
        "json_offset": text.offset,
        "json_bytes": text.size,
        "crc32": zlib.crc32(document, zlib.crc32(data)),
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


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to; it becomes ``path`` when the block ends without an exception."""
    spare = path.with_name(f".{path.name}.{uuid.uuid4().hex}.writing")
    with contextlib.ExitStack() as stack:
        stack.callback(spare.unlink, missing_ok=True)
        yield spare
        spare.replace(path)
