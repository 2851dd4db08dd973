"""Rows and marks that a killed extraction goes on from."""

from pathlib import Path

import numpy as np
import pytest

from alignrec import artifacts
from alignrec.data.shared_array import SharedArray, create_array
from alignrec.features import extraction
from alignrec.features.config import FeaturesConfig


@pytest.mark.parametrize("index", [[2, 3, 4], [0, 1, 5, 8, 9], [7]])
def test_removed_items_leave_zeros_between_the_rows(tmp_path: Path, index: list[int]) -> None:
    expected = np.zeros((10, 3), dtype=np.float32)
    expected[index] = np.random.default_rng(0).normal(size=(len(index), 3))
    create_array(tmp_path / "raw.npy", np.float32, expected.shape)
    with SharedArray.open(tmp_path / "raw.npy") as raw:
        extraction._write_rows(raw, np.array(index), expected[index])
    np.testing.assert_array_equal(np.load(tmp_path / "raw.npy"), expected)


def open_files(folder: Path, batch_size: int) -> extraction._WorkFiles:
    config = FeaturesConfig(batch_size=batch_size)
    shape = (20, 3)
    return extraction._WorkFiles.open(
        artifacts.Draft(folder), shape, -(-shape[0] // batch_size), config
    )


def test_marks_are_kept_but_not_those_of_another_batch_size(tmp_path: Path) -> None:
    (tmp_path / artifacts.WORK).mkdir()
    files = open_files(tmp_path, batch_size=4)
    files.create()
    with SharedArray.open(files.done) as marks:
        marks.write(2, np.ones(1, dtype=np.bool_))
    files.create()
    assert np.flatnonzero(np.load(files.done)).tolist() == [2]
    other = open_files(tmp_path, batch_size=5)
    other.create()
    assert np.load(other.done).tolist() == [False] * 4
    assert not files.done.exists()


def test_a_kill_between_the_files_starts_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / artifacts.WORK).mkdir()
    files = open_files(tmp_path, batch_size=4)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            files.create()
    assert not files.done.exists()
    files.create()
    assert np.load(files.raw).shape == (20, 3)
    assert not np.load(files.done).any()
