"""Keys in, well-mixed 64-bit numbers out (log -> buckets, splits).

A hash only decides where a row is worked on and which of a user's rows are held out; who a user is
remains the key, so two keys with one hash stay two users.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Hashes = npt.NDArray[np.uint64]
_WORD_BYTES = 8
# The n lowest bytes of a little-endian word.
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(_WORD_BYTES + 1)], dtype=np.uint64)


def splitmix64(values: Hashes) -> Hashes:
    """Mix every number by itself (Steele, Lea, Flood 2014)."""
    # Array arithmetic on uint64 wraps around, as it should.
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash_keys(keys: pa.Array) -> Hashes:
    """Return a number per key that depends on the key's UTF-8 bytes alone.

    The bytes are taken as 8-byte words, the last one filled up with zeros, and chained through
    splitmix64 from the length on.

    Args:
        keys: (n,) strings or large strings without nulls.
    """
    if not len(keys):
        return np.zeros(0, dtype=np.uint64)
    _, offset_buffer, data = keys.buffers()
    width = np.int64 if pa.types.is_large_string(keys.type) else np.int32
    offsets = np.frombuffer(offset_buffer, dtype=width)[keys.offset :][: len(keys) + 1]
    starts = (offsets[:-1] - offsets[0]).astype(np.int64)
    lengths = np.diff(offsets).astype(np.int64)
    words = _words_at_every_byte(data, int(offsets[0]), int(offsets[-1]))
    hashes = splitmix64(lengths.astype(np.uint64))
    for done in range(0, int(lengths.max()), _WORD_BYTES):
        longer = np.flatnonzero(lengths > done)
        num_bytes = np.minimum(lengths[longer] - done, _WORD_BYTES)
        word = words[starts[longer] + done] & _LOW_BYTES[num_bytes]
        hashes[longer] = splitmix64(hashes[longer] ^ word)
    return hashes


def hash_pairs(user: Hashes, item: Hashes, *, seed: int) -> Hashes:
    """Return a well-mixed number per (seed, user, item)."""
    mixed = splitmix64(np.full(len(user), seed, dtype=np.uint64))
    return splitmix64(splitmix64(mixed ^ user) ^ item)


def bucket_of(hashes: Hashes, num_buckets: int) -> npt.NDArray[np.int64]:
    """Return the bucket of every hash: equal parts of the range of its upper half."""
    upper = hashes >> np.uint64(32)
    return ((upper * np.uint64(num_buckets)) >> np.uint64(32)).astype(np.int64)


def _words_at_every_byte(
    data: Any,  # noqa: ANN401 - a pyarrow buffer
    start: int,
    stop: int,
) -> Hashes:
    """Return the 8-byte word that begins at each byte, zeros behind the end."""
    padded = np.zeros(stop - start + _WORD_BYTES, dtype=np.uint8)
    if stop > start:
        padded[: stop - start] = np.frombuffer(data, dtype=np.uint8)[start:stop]
    return np.ndarray(stop - start + 1, dtype="<u8", buffer=padded, strides=(1,))
