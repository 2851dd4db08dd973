"""Random numbers that are a function of what they are for, not of who draws them or when.

A sampler that hashes (seed, epoch, node, hop) draws the same sample on any rank, in any order and
after any restart. The mixing function is the finalizer of SplitMix64 (Steele et al., OOPSLA 2014).
"""

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float64, Int64
from torch import Tensor

_WORD = 1 << 64
GOLDEN = 0x9E3779B97F4A7C15
_FIRST, _SECOND = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
# Made once: to make a NumPy scalar takes as long as to mix a thousand words.
_FIRST_SHIFT, _SECOND_SHIFT = np.uint64(30), np.uint64(27)
_FIRST_FACTOR, _SECOND_FACTOR = np.uint64(_FIRST), np.uint64(_SECOND)


def salt(*words: int) -> int:
    """Return a signed 64-bit number that stands for a tuple of integers."""
    state = 0
    for word in words:
        state = _finalize((state + GOLDEN + word) % _WORD)
    return _signed(state)


def hash_ids(
    ids: Int64[Tensor, "*shape"], key: int | Int64[Tensor, "*shape"]
) -> Int64[Tensor, "*shape"]:
    """Return a hash of each id under a key from ``salt`` or another hash: all 64 bits, signed.

    Integer arithmetic wraps, so CPU and CUDA agree bit for bit.
    """
    mixed = ids * _signed(GOLDEN) + key
    mixed = mixed ^ _shift(mixed, 30)
    mixed = mixed * _signed(_FIRST)
    mixed = mixed ^ _shift(mixed, 27)
    mixed = mixed * _signed(_SECOND)
    return mixed ^ _shift(mixed, 31)


def finalize_in_place(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix words in place and return them: the leading bits are as random as those of ``hash_ids``.

    The last step of SplitMix64's finalizer is left out: it changes the lower half alone.
    """
    shifted = words >> _FIRST_SHIFT
    words ^= shifted
    words *= _FIRST_FACTOR
    np.right_shift(words, _SECOND_SHIFT, out=shifted)
    words ^= shifted
    words *= _SECOND_FACTOR
    return words


def uniform(hashes: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
    """Map hashes to [0, 1), in steps of 2**-53."""
    return _shift(hashes, 11).to(torch.float64) * 2.0**-53


def uniform_below(
    hashes: Int64[Tensor, "*shape"], bounds: Int64[Tensor, "*shape"] | int
) -> Int64[Tensor, "*shape"]:
    """Map hashes to 0 .. bounds - 1; the bias is at most bounds / 2**53.

    The largest product is bounds * (1 - 2**-53), which rounds to a number below bounds.
    """
    return (uniform(hashes) * bounds).to(torch.int64)


def _finalize(state: int) -> int:
    state = (state ^ (state >> 30)) * _FIRST % _WORD
    state = (state ^ (state >> 27)) * _SECOND % _WORD
    return state ^ (state >> 31)


def _shift(value: Tensor, bits: int) -> Tensor:
    """Shift right without copying the sign."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    return word - _WORD if word >= _WORD // 2 else word
