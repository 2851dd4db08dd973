"""Rows that several writers put into one file at the same time all arrive."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest

from alignrec.data.shared_array import SharedArray, create_array, map_array


@pytest.mark.parametrize("shape", [(1000,), (1000, 3), (1000, 2, 2)])
@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_writers_of_other_rows_do_not_lose_each_others(
    tmp_path: Path, shape: tuple[int, ...], dtype: type
) -> None:
    path = tmp_path / "rows.npy"
    create_array(path, dtype, shape)
    rows = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    with SharedArray.open(path) as one, SharedArray.open(path) as other:
        for start in range(0, 900, 10):  # many to a page, and turn by turn
            (one if start % 20 else other).write(start, rows[start : start + 10])
    found = np.load(path, mmap_mode="r")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found[:900], rows[:900])
    assert not found[900:].any()


def test_rows_are_converted_and_may_be_slices(tmp_path: Path) -> None:
    create_array(tmp_path / "rows.npy", np.float32, (4, 2))
    wide = np.arange(12, dtype=np.float64).reshape(3, 4)
    with SharedArray.open(tmp_path / "rows.npy") as file:
        file.write(1, wide[:, ::2])
    assert np.load(tmp_path / "rows.npy").tolist() == [[0, 0], [0, 2], [4, 6], [8, 10]]


def test_nothing_at_all_is_an_array_too(tmp_path: Path) -> None:
    create_array(tmp_path / "rows.npy", np.int32, (0,))
    with SharedArray.open(tmp_path / "rows.npy") as file:
        file.write(0, np.empty(0, dtype=np.int64))
    assert np.load(tmp_path / "rows.npy").shape == (0,)


def test_what_is_flushed_is_seen_by_others_before_the_end(tmp_path: Path) -> None:
    create_array(tmp_path / "rows.npy", np.int32, (5,))
    with SharedArray.open(tmp_path / "rows.npy") as file:
        file.write(1, np.array([7, 8]))
        file.flush()
        assert np.load(tmp_path / "rows.npy").tolist() == [0, 7, 8, 0, 0]
        file.write(3, np.array([9]))
        file.sync()
        assert np.load(tmp_path / "rows.npy").tolist() == [0, 7, 8, 9, 0]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (100_000,), (1000, 3)])
def test_a_mapped_array_has_its_place_on_the_disk(tmp_path: Path, shape: tuple[int, ...]) -> None:
    array = map_array(tmp_path / "a.npy", np.float32, shape)
    assert array.shape == shape
    assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes  # not sparse
    array[:] = 3.0
    array.flush()
    assert (np.load(tmp_path / "a.npy") == 3.0).all()


def test_a_full_disk_is_told_before_anything_is_mapped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(np, "load", None)
    with pytest.raises(OSError, match="No space left"):
        map_array(tmp_path / "a.npy", np.float32, (10,))
