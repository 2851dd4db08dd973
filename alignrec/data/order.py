"""In which order samples are read: a pure function of (seed, epoch, position), whatever the ranks.

Blocks of neighbouring samples (they lie in the same shard) are permuted, and then the samples
inside windows of that stream. Both permutations are Feistel networks, so nothing is stored: any
position of any epoch can be asked for at once, which is what makes a resume exact at no cost.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK_64 = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class EpochOrder:
    """The order of one epoch over ``num_samples`` samples.

    Attributes:
        num_samples: samples 0 .. num_samples - 1, each once.
        seed: of the whole run.
        epoch: counted from 0.
        block_size: neighbours that stay near each other, so that shards are read in large pieces.
        window_size: samples that are mixed with each other.
    """

    num_samples: int
    seed: int
    epoch: int
    block_size: int
    window_size: int

    def samples(self, positions: Ints) -> Ints:
        """Return which sample comes at each position of the epoch (positions in range)."""
        return self._unblock(self._unwindow(positions))

    def _unwindow(self, positions: Ints) -> Ints:
        """Map positions to the stream of blocks: permuted inside each window."""
        window = positions // self.window_size
        start = window * self.window_size
        length = np.minimum(self.window_size, self.num_samples - start)
        offset = np.empty_like(positions)
        for number in np.unique(window):
            inside = window == number
            key = permutation_key(self.seed, self.epoch, 1, int(number))
            offset[inside] = permute((positions - start)[inside], int(length[inside][0]), key)
        return start + offset

    def _unblock(self, stream: Ints) -> Ints:
        """Map stream positions to samples; the last block may be shorter than the others."""
        num_blocks = -(-self.num_samples // self.block_size)
        key = permutation_key(self.seed, self.epoch, 0, 0)
        last = num_blocks - 1
        last_length = self.num_samples - last * self.block_size
        slot = int(unpermute(np.array([last]), num_blocks, key)[0])  # where the short block comes
        short_start = slot * self.block_size
        after = stream >= short_start + last_length
        shifted = np.where(after, stream + (self.block_size - last_length), stream)
        block = permute(shifted // self.block_size, num_blocks, key)
        samples: Ints = block * self.block_size + shifted % self.block_size
        return samples


def permute(values: Ints, size: int, key: np.uint64) -> Ints:
    """Return the images of ``values`` under a keyed permutation of 0 .. size - 1."""
    return _walk(values, size, key, range(_ROUNDS))


def unpermute(values: Ints, size: int, key: np.uint64) -> Ints:
    """Return what ``permute`` maps to ``values``."""
    return _walk(values, size, key, range(_ROUNDS - 1, -1, -1))


def _walk(values: Ints, size: int, key: np.uint64, rounds: range) -> Ints:
    """Run the network on the next power of four until each value is back below ``size``."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    result = values.astype(np.uint64)
    pending = np.ones(len(result), dtype=bool)
    while pending.any():
        result[pending] = _feistel(result[pending], half, key, rounds)
        pending = result >= np.uint64(size)
    return result.astype(np.int64)


def _feistel(
    values: npt.NDArray[np.uint64], half: int, key: np.uint64, rounds: range
) -> npt.NDArray[np.uint64]:
    bits, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = values >> bits, values & mask
    backwards = rounds.step < 0
    for number in rounds:
        salt = np.uint64((int(key) + _GOLDEN * (number + 1)) & _MASK_64)
        if backwards:
            left, right = right ^ (_mix(left + salt) & mask), left
        else:
            left, right = right, left ^ (_mix(right + salt) & mask)
    return (left << bits) | right


def _mix(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return a 64-bit hash of each value (the finaliser of SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def permutation_key(*parts: int) -> np.uint64:
    """Return the key of a permutation from a seed and what tells it from others."""
    return np.uint64(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0])


def item_places(item_index: npt.NDArray[np.integer[Any]], *, seed: int) -> npt.NDArray[np.float64]:
    """Return a hash of (seed, item_index) in [0, 1): items below a limit are a sample.

    An item keeps its place, and so its side of a limit, when the catalogue grows.
    """
    salt = permutation_key(seed, 2)
    hashed = _mix(_mix(item_index.astype(np.uint64) + salt) + np.uint64(_GOLDEN))
    places: npt.NDArray[np.float64] = (hashed >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return places
