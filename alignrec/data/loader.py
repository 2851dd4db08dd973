"""Batches of decoded pictures and tokenised texts for one rank (dataset -> pretrain, features).

A global batch is a range of positions of the epoch's order; each rank takes its share by position.
So the global stream of items is the same for any number of ranks and threads, every sample comes
once an epoch over all ranks, and (epoch, batch) alone says where to go on after a stop.
"""

import concurrent.futures
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from alignrec.data.images import Pixels, decode
from alignrec.data.order import EpochOrder
from alignrec.data.shards import RawSample, ShardReader

Ints = npt.NDArray[np.int64]
T = TypeVar("T")

NO_ITEM = -1
_AUGMENTATION = 3  # stream number of the random crops, apart from those of order and masks


class Tokenize(Protocol):
    """Texts to token ids, special tokens included, at most as long as the encoder reads."""

    def __call__(self, texts: Sequence[str]) -> Sequence[Sequence[int]]:
        """Return the ids; a text without words gives the special tokens alone."""
        ...


@dataclasses.dataclass(frozen=True)
class ItemBatch:
    """Items ready to be encoded; padding rows have item_index -1 and neither picture nor text.

    Attributes:
        item_index: (batch,) int64.
        images: (batch, size, size, 3) uint8; zeros without a picture.
        has_image: (batch,) bool.
        tokens: (batch, length) int64, padded with the tokenizer's padding id.
        text_padding: (batch, length) bool, True where no token is; all True without a text.
    """

    item_index: Ints
    images: Pixels
    has_image: npt.NDArray[np.bool_]
    tokens: Ints
    text_padding: npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """Which samples one rank reads for one micro step; ``rows`` may be shorter at the end."""

    epoch: int
    rows: Ints


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which samples each rank reads at each optimizer step.

    Attributes:
        rows: rows of the sample table to train on.
        seed: of the order.
        global_batch_size: samples in one optimizer step over all ranks; the last batch of an
            epoch is shorter and never dropped, so some ranks may read nothing in it.
        micro_batch_size: samples of one rank in one forward pass.
        num_ranks: data-parallel ranks.
        accumulation: micro steps in one optimizer step.
        block_size: see EpochOrder.
        window_size: see EpochOrder.
    """

    rows: Ints
    seed: int
    global_batch_size: int
    micro_batch_size: int
    num_ranks: int
    accumulation: int
    block_size: int = 256
    window_size: int = 65_536

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over all samples."""
        return -(-len(self.rows) // self.global_batch_size)

    def global_batch(self, step: int) -> MicroBatch:
        """Return all samples of the optimizer step after ``step`` finished ones, in order."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        start = batch * self.global_batch_size
        positions = np.arange(start, min(start + self.global_batch_size, len(self.rows)))
        return MicroBatch(epoch, self.rows[self.order(epoch=epoch).samples(positions)])

    def order(self, *, epoch: int) -> EpochOrder:
        """Return the order of an epoch over positions in ``rows``."""
        return EpochOrder(len(self.rows), self.seed, epoch, self.block_size, self.window_size)

    def micro_batches(self, step: int, rank_index: int) -> list[MicroBatch]:
        """Return this rank's share of a global batch, one entry per micro step."""
        whole = self.global_batch(step)
        stride = self.micro_batch_size * self.num_ranks
        starts = [
            micro * stride + rank_index * self.micro_batch_size
            for micro in range(self.accumulation)
        ]
        return [
            MicroBatch(whole.epoch, whole.rows[start : start + self.micro_batch_size])
            for start in starts
        ]


class ItemReader:
    """Turns rows of the sample table into batches; called from the loader's threads."""

    def __init__(
        self,
        reader: ShardReader,
        tokenize: Tokenize,
        *,
        image_size: int,
        padding_id: int,
        augment_seed: int | None = None,
    ) -> None:
        """Keep what is needed to decode.

        Args:
            reader: gives the bytes.
            tokenize: the texts of a batch to token ids.
            image_size: side of the decoded pictures in pixels.
            padding_id: token id of padding.
            augment_seed: seed of the random crops and flips; None takes whole pictures.
        """
        self._reader = reader
        self._tokenize = tokenize
        self._image_size = image_size
        self._padding_id = padding_id
        self._augment_seed = augment_seed

    def read(self, batch: MicroBatch) -> ItemBatch:
        """Return the decoded batch; an empty one becomes a single padding row."""
        samples = [self._reader.read(row) for row in batch.rows.tolist()]
        count = max(len(samples), 1)
        size = self._image_size
        images = np.zeros((count, size, size, 3), dtype=np.uint8)
        item_index = np.full(count, NO_ITEM, dtype=np.int64)
        has_image = np.zeros(count, dtype=bool)
        for position, sample in enumerate(samples):
            item_index[position] = sample.item_index
            has_image[position] = bool(sample.image)
            if sample.image:
                images[position] = decode(
                    sample.image,
                    size=size,
                    rng=self._rng(batch.epoch, sample.item_index),
                    name=f"item_index {sample.item_index}",
                )
        tokens, padding = pad_tokens(self._tokens(samples, count), self._padding_id)
        return ItemBatch(item_index, images, has_image, tokens, padding)

    def _tokens(self, samples: Sequence[RawSample], count: int) -> list[Sequence[int]]:
        """Return each sample's token ids, all in one call of the tokenizer; none without a text."""
        texts: list[Sequence[int]] = [[]] * count
        told = [position for position, sample in enumerate(samples) if sample.text]
        ids = self._tokenize([samples[position].text for position in told]) if told else []
        for position, tokens in zip(told, ids, strict=True):
            texts[position] = tokens
        return texts

    def _rng(self, epoch: int, item_index: int) -> np.random.Generator | None:
        if self._augment_seed is None:
            return None
        return np.random.default_rng([self._augment_seed, _AUGMENTATION, epoch, item_index])


class Loader(Generic[T]):
    """Makes the next batches in threads while the caller computes.

    Threads, not processes: decoding releases the interpreter lock, a kill leaves no shared memory
    behind, and nothing is pickled.
    """

    def __init__(
        self, make: Callable[[MicroBatch], T], *, num_threads: int = 1, prefetch: int = 4
    ) -> None:
        """Keep what makes a batch.

        Args:
            make: reads, decodes and prepares one micro batch; must depend on it alone.
            num_threads: threads that call ``make``.
            prefetch: micro batches made ahead.
        """
        self._make = make
        self._num_threads = num_threads
        self._prefetch = max(prefetch, num_threads)
        self.wait_seconds = 0.0

    def batches(self, micro_batches: Iterable[MicroBatch]) -> Generator[T, None, None]:
        """Yield the made batches in the order given; ``wait_seconds`` adds up the waiting.

        Close it when not all are taken; it closes ``micro_batches`` if that is a generator.
        """
        source = iter(micro_batches)
        waiting: deque[concurrent.futures.Future[T]] = deque()
        pool = concurrent.futures.ThreadPoolExecutor(self._num_threads, "loader")
        try:
            for batch in source:
                waiting.append(pool.submit(self._make, batch))
                if len(waiting) > self._prefetch:
                    yield self._next(waiting)
            while waiting:
                yield self._next(waiting)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(source, Generator):  # it may be fetching what nobody reads any more
                source.close()
            pool.shutdown(wait=True)

    def _next(self, waiting: "deque[concurrent.futures.Future[T]]") -> T:
        start = time.monotonic()
        result = waiting.popleft().result()
        self.wait_seconds += time.monotonic() - start
        return result


def pad_tokens(
    texts: Sequence[Sequence[int]], padding_id: int
) -> tuple[Ints, npt.NDArray[np.bool_]]:
    """Return token ids (batch, longest) and where padding is; at least one column."""
    longest = max(1, *(len(text) for text in texts))
    tokens = np.full((len(texts), longest), padding_id, dtype=np.int64)
    padding = np.ones((len(texts), longest), dtype=bool)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = text
        padding[row, : len(text)] = False
    return tokens, padding
