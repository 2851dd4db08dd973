"""Pictures of a chunk: kept from the version before, or fetched ahead and prepared (-> shards)."""

import dataclasses
import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from data_prep import fetching, images
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules, Picture
from data_prep.quarantine import Reason
from data_prep.reuse import Attempt, Base, source_digest, state_of_bytes

IMAGE = "image"
IMAGE_BYTES = "image_bytes"
# The source of a picture whose state cannot be told: equal to none that a version has recorded.
_UNSURE = "?"
Verdict = Picture | BadImage | None


@dataclasses.dataclass(frozen=True)
class PictureRules:
    """How pictures are read and prepared.

    Attributes:
        images: what a picture may be and becomes.
        revision: the user's word that pictures changed under the same names.
        read_threads: pictures that are read at once.
    """

    images: ImageRules
    revision: str
    read_threads: int


@dataclasses.dataclass(frozen=True)
class Loaded:
    """What became of one item's picture.

    Attributes:
        verdict: the picture, why there is none, or None where the item names none.
        source: what a next version compares; empty without a picture and after a failure that may
            pass without leaving a trace in the source.
        is_kept: the version before, or a run of this one that was stopped, had it.
    """

    verdict: Verdict
    source: str
    is_kept: bool = False


def sources(rows: pa.Table, rules: PictureRules) -> list[str]:
    """Return the source of each row's picture as it is now; empty where the row names none."""
    references = rows[IMAGE].to_pylist()
    contents = rows[IMAGE_BYTES].to_pylist()

    def source(position: int) -> str:
        reference, content = references[position], contents[position]
        if content is not None:
            return source_digest(rules.images.preparation, state_of_bytes(content))
        if reference is None:
            return ""
        state = fetching.source_state(reference, rules.images)
        if state == fetching.UNKNOWN:
            return _UNSURE
        # An address has no state, so all of it says which picture is meant: the root too.
        place = reference if state else fetching.resolve(reference, rules.images)
        return _source_of(place, state, rules)

    positions = range(len(references))
    if "://" not in rules.images.root and not any("://" in name for name in references if name):
        return [source(position) for position in positions]
    with ThreadPoolExecutor(rules.read_threads) as pool:  # object stores answer slowly
        return list(pool.map(source, positions))


def _source_of(reference: str, state: str, rules: PictureRules) -> str:
    return source_digest(rules.images.preparation, rules.revision, state, reference)


class Earlier:
    """The pictures that the version before, or a stopped run, has of a range of items."""

    def __init__(self, base: Base | Attempt, first: int, end: int) -> None:
        self._base = base
        self._samples = _by_item(base.rows("samples", first, end))
        self._pictures = _by_item(base.rows("pictures", first, end))
        self._shard = ""
        self._content: bytes | None = None
        self.damaged: list[str] = []

    def find(self, item_index: int, source: str) -> Verdict:
        """Return the verdict on an unchanged picture; None where it has to be looked at again."""
        known = self._pictures.get(item_index)
        if known is None or known["source"] != source:
            return None
        if known["reason"]:
            return BadImage(Reason(known["reason"]), known["detail"])
        sample = self._samples[item_index]
        content = self._read(sample["shard"])
        if content is None:
            return None
        start = sample["image_offset"]
        data = content[start : start + sample["image_bytes"]]
        return Picture(data, **{k: known[k] for k in ("width", "height", "kept", "animated")})

    def _read(self, shard: str) -> bytes | None:
        """Return a shard's bytes if they are what they were; one is held, items come in order."""
        if shard != self._shard:
            self._shard = shard
            self._content = read_verified(self._base, shard)
            if self._content is None:
                self.damaged.append(shard)
        return self._content


def read_verified(base: Base | Attempt, shard: str) -> bytes | None:
    """Return the bytes of a base's shard, None where they are not what its checksum says."""
    known = base.chunk_of(shard)
    try:
        content = (base.folder / shard).read_bytes()
    except OSError:
        return None
    intact = known is not None and hashlib.sha256(content).hexdigest() == known.sha256
    return content if intact else None


def load(
    rows: Sequence[dict[str, Any]],
    expected: Sequence[str],
    rules: PictureRules,
    earlier: Earlier | None,
) -> Iterator[Loaded]:
    """Yield what becomes of every row's picture; reading is ahead, decoding on this thread.

    Args:
        rows: the rows of a chunk.
        expected: the source of each.
        rules: how pictures are read and prepared.
        earlier: what the version before has.
    """
    with Fetcher(rules.images) as fetcher, ThreadPoolExecutor(rules.read_threads) as pool:
        waiting: deque[Callable[[], Loaded]] = deque()
        ahead = iter(zip(rows, expected, strict=True))

        def read_next() -> None:
            pair = next(ahead, None)
            if pair is not None:
                waiting.append(_begin(*pair, earlier, fetcher, pool, rules))

        for _ in range(2 * rules.read_threads):
            read_next()
        for _ in rows:
            finish = waiting.popleft()
            loaded = finish()
            read_next()
            yield loaded


def _begin(
    row: dict[str, Any],
    source: str,
    earlier: Earlier | None,
    fetcher: Fetcher,
    pool: ThreadPoolExecutor,
    rules: PictureRules,
) -> Callable[[], Loaded]:
    """Begin to get a picture; return what ends it."""
    if not source:
        return lambda: Loaded(None, "")
    known = earlier.find(row["item_index"], source) if earlier else None
    if known is not None:
        return lambda: Loaded(known, source, is_kept=True)
    content = row[IMAGE_BYTES]
    if content is not None:
        return lambda: _prepared(content, source, rules.images)
    reading = pool.submit(fetcher.read, row[IMAGE])
    return lambda: _fetched(reading, row[IMAGE], source, rules)


def _fetched(reading: Future[bytes], reference: str, source: str, rules: PictureRules) -> Loaded:
    try:
        data = reading.result()
    except BadImage as verdict:
        # What a web host answers instead of a picture says nothing of its next answer, and what was
        # there and is missing now may have been away with its storage.
        is_web = fetching.web_address(reference, rules.images) is not None
        is_away = verdict.reason == Reason.IMAGE_MISSING and source != _source_of(
            reference, fetching.ABSENT, rules
        )
        return _judged(verdict, "" if is_web or is_away else source)
    return _prepared(data, source, rules.images)


def _prepared(data: bytes, source: str, rules: ImageRules) -> Loaded:
    try:
        if len(data) > rules.max_bytes:
            detail = f"{len(data)} bytes in the item table"
            raise BadImage(Reason.IMAGE_TOO_LARGE, detail)
        return Loaded(images.prepare(data, rules), "" if source == _UNSURE else source)
    except BadImage as verdict:
        return _judged(verdict, source)


def _judged(verdict: BadImage, source: str) -> Loaded:
    """Record no source for what may pass: the next version tries again."""
    # A file that cannot be read may be readable tomorrow without any change of the file itself.
    passing = verdict.transient or verdict.reason == Reason.IMAGE_UNREADABLE
    return Loaded(verdict, "" if passing or source == _UNSURE else source)


def _by_item(table: pa.Table) -> dict[int, dict[str, Any]]:
    return {row["item_index"]: row for row in table.to_pylist()}
