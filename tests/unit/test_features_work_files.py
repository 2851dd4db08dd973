"""Rows and marks that a killed extraction goes on from."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from alignrec import artifacts
from alignrec.data.shared_array import SharedArray, create_array
from alignrec.distributed.process_group import Rank, rank_from_environment
from alignrec.distributed.watchdog import Watchdog
from alignrec.features import extraction
from alignrec.features.config import FeaturesConfig
from alignrec.pretrain.encoder import FeaturePart
from alignrec.stage import Context
from alignrec.telemetry import Telemetry
from alignrec.testing.datasets import write_dataset


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
    parts = [FeaturePart("image", 1), FeaturePart("text", 2)]
    return extraction._WorkFiles.open(
        artifacts.Draft(folder), parts, 20, -(-20 // batch_size), config
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


def test_who_is_done_waits_as_long_as_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host that is slower than the timeout is no lost peer; one that stands still is."""
    (tmp_path / artifacts.WORK).mkdir()
    files = open_files(tmp_path, batch_size=4)
    files.create()
    clock, alive = [0.0], []

    def another_batch(_: float) -> None:
        clock[0] += 8.0
        left = np.flatnonzero(~np.load(files.done))
        if len(left) > 1:
            with SharedArray.open(files.done) as marks:
                marks.write(int(left[0]), np.ones(1, dtype=np.bool_))

    monkeypatch.setattr(extraction.time, "sleep", another_batch)
    monkeypatch.setattr(extraction.time, "monotonic", lambda: clock[0])
    files.wait(seconds=10.0, alive=lambda: alive.append(files.num_left()))
    assert alive == [4, 3, 2, 1]
    assert clock == [8.0 * 6]  # two looks without a batch


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


def test_ranks_of_a_host_are_what_the_launcher_says() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
    assert rank_from_environment(torchrun).local_world_size == 4
    assert rank_from_environment({"RANK": "1", "WORLD_SIZE": "2"}).local_world_size == 2
    assert rank_from_environment({}).local_world_size == 1


def test_ranks_share_the_look_ahead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They read different shards, so a third of the look-ahead is each one's."""
    told: list[int] = []

    def opened(*_: object, num_readers: int) -> None:
        told.append(num_readers)
        raise KeyboardInterrupt

    (tmp_path / "draft" / artifacts.WORK).mkdir(parents=True)
    dataset = write_dataset(tmp_path / "d", num_items=20, image_size=16)
    monkeypatch.setattr(extraction, "open_shards", opened)
    encoder = SimpleNamespace(feature_parts=lambda _: [FeaturePart(None, 8)])
    encoder.to = lambda _: encoder
    monkeypatch.setattr(extraction, "load_encoder", lambda _: encoder)
    with pytest.raises(KeyboardInterrupt):
        extraction._extract(
            FeaturesConfig(),
            Context(
                output=tmp_path / "out",
                log_dir=tmp_path,
                fingerprint="",
                inputs={"dataset": dataset, "encoder": tmp_path},
            ),
            artifacts.Draft(tmp_path / "draft"),
            Rank(local_world_size=3),
            Telemetry(tmp_path, "features", enabled=False),
            Watchdog(Rank(), tmp_path, seconds=None, doing=""),
        )
    assert told == [3]
