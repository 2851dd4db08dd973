"""Hashes of keys against a plain implementation, and what they do not depend on."""

import numpy as np
import pyarrow as pa

from data_prep import hashing

MASK = (1 << 64) - 1
KEYS = ["", "a", "b", "user-01", "user-012", "user-0123", "ü" * 9, "x" * 256, "\x00", "\x00\x00"]


def mixed(value: int) -> int:
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


def plain_hash(key: str) -> int:
    data = key.encode()
    result = mixed(len(data))
    for start in range(0, len(data), 8):
        result = mixed(result ^ int.from_bytes(data[start : start + 8], "little"))
    return result


def test_a_key_is_hashed_word_by_word() -> None:
    assert hashing.hash_keys(pa.array(KEYS)).tolist() == [plain_hash(key) for key in KEYS]


def test_a_hash_depends_on_the_key_alone() -> None:
    sliced = pa.array(["something", *KEYS, "else"]).slice(1, len(KEYS))
    assert (hashing.hash_keys(sliced) == hashing.hash_keys(pa.array(KEYS))).all()
    assert len(hashing.hash_keys(pa.array([], pa.string()))) == 0
    assert len(set(hashing.hash_keys(pa.array(KEYS)).tolist())) == len(KEYS)


def test_keys_of_more_than_2_gib_have_the_same_hashes() -> None:
    large = pa.array(["something", *KEYS, "else"], pa.large_string()).slice(1, len(KEYS))
    assert hashing.hash_keys(large).tolist() == [plain_hash(key) for key in KEYS]


def test_buckets_are_of_about_equal_size() -> None:
    hashes = hashing.hash_keys(pa.array([f"user-{number:07d}" for number in range(70_000)]))
    for num_buckets in (1, 7, 100):
        buckets = hashing.bucket_of(hashes, num_buckets)
        counts = np.bincount(buckets, minlength=num_buckets)
        assert len(counts) == num_buckets
        expected = len(hashes) / num_buckets
        assert abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_pairs_are_hashed_in_order_and_by_seed() -> None:
    hashes = hashing.hash_keys(pa.array(["a", "b"]))
    there = hashing.hash_pairs(hashes, hashes[::-1], seed=0)
    assert there[0] == mixed(mixed(mixed(0) ^ plain_hash("a")) ^ plain_hash("b"))
    assert there[0] != there[1]
    assert (there != hashing.hash_pairs(hashes, hashes[::-1], seed=1)).all()
