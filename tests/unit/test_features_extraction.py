"""The encoder's rows without a trained encoder: formats of numbers, progress, and empty things."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignrec import configuration
from alignrec.distributed.watchdog import Watchdog
from alignrec.errors import UserError
from alignrec.features import STAGE, extraction
from alignrec.features.config import FeaturesConfig
from alignrec.stage import Context
from alignrec.testing.datasets import write_dataset
from alignrec.testing.pretraining import write_encoder

NUM_ITEMS = 22


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(
        tmp_path_factory.mktemp("data") / "dataset",
        num_items=NUM_ITEMS,
        image_size=16,
        without_image=(4, 7),
        without_text=(5, 7),
    )


@pytest.fixture(scope="module")
def encoder(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "encoder", dataset)


def extract(dataset: Path, encoder: Path, output: Path, **settings: Any) -> np.ndarray:
    section = {"batch_size": 8, **settings}
    config = configuration.build(FeaturesConfig, section, section="features")
    inputs = {"dataset": dataset, "encoder": encoder}
    mark = STAGE.fingerprint(config, inputs)
    extraction.run(config, Context(inputs, output, mark, output.with_name(output.name + ".logs")))
    features: np.ndarray = np.load(output / "features.npy")
    return features


def test_half_precision_gives_nearly_the_same_directions(
    dataset: Path, encoder: Path, tmp_path: Path
) -> None:
    raw = {"pooling": "all", "center": False}
    whole = extract(dataset, encoder, tmp_path / "fp32", extraction=raw)
    half = extract(dataset, encoder, tmp_path / "bf16", extraction={**raw, "precision": "bf16"})
    assert half.dtype == np.float32
    assert not np.array_equal(half, whole)
    cosine = (half * whole).sum(axis=1)
    assert (half[7] == 0).all()
    assert np.delete(cosine, 7).min() > 0.999
    np.testing.assert_allclose(half, whole, rtol=0, atol=0.02)


def test_a_resumed_progress_counts_the_items_that_are_done(
    dataset: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = extraction._Worker.encode

    def stop_at_last(self: Any, batch: Any) -> Any:
        if len(batch.item_index) < 8:
            raise KeyboardInterrupt
        return encode(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(extraction._Worker, "encode", stop_at_last)
        with pytest.raises(KeyboardInterrupt):
            extract(dataset, encoder, tmp_path / "stopped")
    capsys.readouterr()
    extract(dataset, encoder, tmp_path / "stopped")
    assert f"{NUM_ITEMS}/{NUM_ITEMS} items in" in capsys.readouterr().out


def test_progress_and_watchdog_hear_of_every_batch(
    dataset: Path,
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    heard: list[str] = []
    monkeypatch.setattr(Watchdog, "alive", lambda _: heard.append("alive"))
    monkeypatch.setattr(Watchdog, "beat", lambda _: heard.append("beat"))
    extract(dataset, encoder, tmp_path / "features")
    assert heard == ["beat", *["alive"] * 3, "beat"]  # the first when it begins to watch
    assert f"{NUM_ITEMS}/{NUM_ITEMS} items in" in capsys.readouterr().out


def test_items_without_anything_at_all_have_rows_of_zeros(encoder: Path, tmp_path: Path) -> None:
    nothing = tuple(range(9))
    dataset = write_dataset(
        tmp_path / "d", num_items=9, num_users=4, without_image=nothing, without_text=nothing
    )
    settings = {"pooling": "all", "whiten": 0.5}
    rows = extract(dataset, encoder, tmp_path / "features", extraction=settings)
    assert rows.shape == (9, 48)
    assert (rows == 0).all()
    assert not np.load(tmp_path / "features" / "mask.npy").any()


def test_a_catalogue_whose_items_are_all_removed_is_refused(encoder: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "d", num_items=9, num_users=0, removed=tuple(range(9)))
    with pytest.raises(UserError, match="has no samples"):
        extract(dataset, encoder, tmp_path / "features")
