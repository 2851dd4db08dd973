"""The seeded dataset artifact that other tests start from."""

import json
from pathlib import Path

import numpy as np

from alignrec import artifacts
from alignrec.data import schema
from alignrec.testing.datasets import write_dataset


def test_it_is_a_whole_dataset_artifact_and_equal_seeds_give_equal_files(tmp_path: Path) -> None:
    first = write_dataset(tmp_path / "a", num_items=20, num_users=5, without_image=(3,))
    second = write_dataset(tmp_path / "b", num_items=20, num_users=5, without_image=(3,))
    manifest = artifacts.verify(first)
    assert manifest.identity == artifacts.read(second, "dataset").identity
    assert manifest.counts["num_without_image"] == 1
    assert (manifest.counts["num_train"], manifest.counts["num_test"]) == (30, 5)


def test_samples_point_at_payloads(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", num_items=20, num_users=5, without_image=(3,))
    texts = schema.read_items(folder)["text"].to_pylist()
    for row in schema.read_samples(folder).to_pylist():
        content = (folder / row["shard"]).read_bytes()
        payload = content[row["json_offset"] :][: row["json_bytes"]]
        assert json.loads(payload)["text"] == texts[row["item_index"]]
        image = content[row["image_offset"] :][: row["image_bytes"]]
        assert image[:2] == (b"" if row["item_index"] == 3 else b"\xff\xd8")


def test_splits_are_sorted_and_disjoint(tmp_path: Path) -> None:
    folder = write_dataset(tmp_path / "a", num_items=20, num_users=5)
    pairs = []
    for split in schema.SPLITS:
        users, items = schema.read_interactions(folder, split)
        keys = users * 20 + items
        assert np.all(np.diff(keys) > 0)
        pairs.append(keys)
    everything = np.concatenate(pairs)
    assert len(np.unique(everything)) == len(everything)
