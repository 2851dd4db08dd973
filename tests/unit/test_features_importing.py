"""Imported features, hiding of a modality, and the settings of the stage."""

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignrec import artifacts, configuration
from alignrec.data.embeddings import read_features
from alignrec.data.shared_array import SharedArray
from alignrec.errors import UserError
from alignrec.features import STAGE, extraction
from alignrec.features.config import ExtractionConfig, FeaturesConfig
from alignrec.features.extraction import content_mask
from alignrec.stage import Context, main
from alignrec.testing.datasets import write_dataset

NUM_ITEMS = 12


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write_dataset(tmp_path / "dataset", num_items=NUM_ITEMS, without_image=(3,))


def save_matrix(path: Path, rows: int = NUM_ITEMS, columns: int = 5, **zero: Any) -> Path:
    matrix = np.random.default_rng(0).normal(2, 1, size=(rows, columns)).astype(np.float16)
    matrix[zero.get("zero", [])] = 0
    np.save(path, matrix)
    return path


def import_files(dataset: Path, files: list[dict[str, Any]], **settings: Any) -> Path:
    section = {"files": files, **settings}
    config = configuration.build(FeaturesConfig, section, section="features")
    output = dataset.parent / "features"
    inputs = {"dataset": dataset}
    mark = STAGE.fingerprint(config, inputs)
    extraction.run(config, Context(inputs, output, mark, dataset.parent / "logs"))
    return output


def test_files_become_unit_rows_side_by_side(dataset: Path, tmp_path: Path) -> None:
    image = save_matrix(tmp_path / "image.npy", columns=5, zero=[3])
    text = save_matrix(tmp_path / "text.npy", columns=4)
    output = import_files(
        dataset,
        [
            {"path": str(image), "modality": "image", "center": True},
            {"path": str(text), "modality": "text"},
        ],
    )
    features = np.load(output / "features.npy", mmap_mode="r")
    given = np.load(image).astype(np.float64)
    present = np.arange(NUM_ITEMS) != 3
    centered = given - given[present].mean(axis=0)
    expected = centered / np.linalg.norm(centered, axis=1, keepdims=True)
    np.testing.assert_allclose(features[present, :5], expected[present], atol=1e-6)
    np.testing.assert_array_equal(features[3, :5], 0)
    np.testing.assert_allclose(np.linalg.norm(features[:, 5:], axis=1), 1, atol=1e-6)
    mask = np.load(output / "mask.npy")
    assert mask[:, 0].tolist() == present.tolist()
    assert mask[:, 1].all()
    assert artifacts.verify(output).counts == {"num_items": NUM_ITEMS, "dim": 9}


def test_a_full_disk_ends_the_stage_with_a_line(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Not with SIGBUS: nothing is written through a mapping."""

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(SharedArray, "write", full)
    image = save_matrix(tmp_path / "image.npy")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"features: {{files: [{{path: {image}, modality: image}}]}}")
    folders = ["--dataset", str(dataset), "--output", str(tmp_path / "features")]
    assert main(STAGE, [*folders, "--recipe", str(recipe)]) == 1
    assert "No space left on device), so the stage stopped" in capsys.readouterr().err


def test_wrong_files_are_told_apart(dataset: Path, tmp_path: Path) -> None:
    short = save_matrix(tmp_path / "short.npy", rows=NUM_ITEMS - 1)
    with pytest.raises(UserError, match="11 rows but the dataset has 12 items"):
        import_files(dataset, [{"path": str(short), "modality": "image"}])
    with pytest.raises(UserError, match=r"cannot read .*absent.npy"):
        import_files(dataset, [{"path": str(tmp_path / "absent.npy"), "modality": "image"}])
    np.save(tmp_path / "flat.npy", np.zeros(NUM_ITEMS))
    with pytest.raises(UserError, match=r"shape \(12,\)"):
        import_files(dataset, [{"path": str(tmp_path / "flat.npy"), "modality": "image"}])
    np.savez(tmp_path / "several.npz", np.zeros((NUM_ITEMS, 2)))
    with pytest.raises(UserError, match=r"cannot read .*several.npz.*Give the path of a .npy"):
        import_files(dataset, [{"path": str(tmp_path / "several.npz"), "modality": "image"}])
    (tmp_path / "empty.npy").touch()
    with pytest.raises(UserError, match=r"cannot read .*empty.npy"):
        import_files(dataset, [{"path": str(tmp_path / "empty.npy"), "modality": "image"}])
    bad = np.zeros((NUM_ITEMS, 2))
    bad[7, 1] = np.inf
    np.save(tmp_path / "bad.npy", bad)
    with pytest.raises(UserError, match="infinity in row 7"):
        import_files(dataset, [{"path": str(tmp_path / "bad.npy"), "modality": "image"}])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04"])
def test_damaged_features_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "features.npy").write_bytes(content)
    with pytest.raises(UserError, match=r"features.npy cannot be read"):
        read_features(tmp_path, num_items=NUM_ITEMS)


def test_sources_must_be_named_once(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="either an encoder"):
        import_files(dataset, [])
    file = save_matrix(tmp_path / "image.npy")
    with pytest.raises(UserError, match="has no effect"):
        import_files(
            dataset,
            [{"path": str(file), "modality": "image"}],
            extraction={"pooling": "mean"},
        )


def test_a_changed_file_makes_the_features_stale(dataset: Path, tmp_path: Path) -> None:
    file = save_matrix(tmp_path / "image.npy")
    section = {"files": [{"path": str(file), "modality": "image"}]}
    config = configuration.build(FeaturesConfig, section, section="features")
    before = STAGE.fingerprint(config, {"dataset": dataset})
    save_matrix(file, columns=6)
    assert STAGE.fingerprint(config, {"dataset": dataset}) != before


def test_hiding_takes_one_modality_from_a_fixed_share(dataset: Path) -> None:
    whole = content_mask(dataset, ExtractionConfig())
    assert whole.sum(axis=0).tolist() == [NUM_ITEMS - 1, NUM_ITEMS]
    hidden = content_mask(dataset, ExtractionConfig(hide="text", hide_fraction=0.5))
    assert np.array_equal(hidden[:, 0], whole[:, 0])
    assert hidden[:, 1].sum() == NUM_ITEMS / 2
    more = content_mask(dataset, ExtractionConfig(hide="text", hide_fraction=0.75))
    assert not (more & ~hidden).any()  # whoever lost it at 50 % has lost it at 75 %
    image = content_mask(dataset, ExtractionConfig(hide="image", hide_fraction=1.0))
    assert not image[:, 0].any()
