"""The graph stage on several ranks writes what it writes on one."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from alignrec import artifacts
from alignrec.data.schema import interactions_path
from alignrec.distributed.process_group import process_group
from alignrec.graph import searching
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks

SETTINGS: dict[str, dict[str, Any]] = {
    "exact": {"knn": {"method": "exact"}},
    "ann": {"knn": {"method": "ann", "sample": 50}},
    "update": {"knn": {"method": "exact"}},
    "ann-update": {"knn": {"method": "ann", "sample": 50}},
    "streaming": {"partition_method": "streaming", "num_partitions": 5},
}


def build(folder: Path, dataset: Path, features: Path, before: dict[str, Path]) -> None:
    """Build a graph by each of the settings."""
    searching._CHUNK_ROWS = 8  # several chunks for each rank
    with process_group():  # once for all: ranks that join again at once could miss each other
        for name, settings in SETTINGS.items():
            knn = dict(settings.get("knn", {}))
            if name in before:
                knn["previous"] = str(before[name])
            write_graph(
                folder / name,
                dataset=dataset,
                features=features,
                **{"k": 3, **settings, "knn": knn},
            )


@pytest.mark.multiprocess
def test_two_ranks_write_the_same_bytes_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 8)
    dataset = write_dataset(tmp_path / "dataset", num_items=90, num_users=30)
    log = interactions_path(dataset, "train")
    pq.write_table(pq.read_table(log), log, row_group_size=20)  # some for each rank
    features = write_features(tmp_path / "features", num_items=90)
    rows = np.load(features / "features.npy")[:75]
    rows[4] = 0
    fewer = write_features(tmp_path / "fewer", num_items=75)
    np.save(fewer / "features.npy", rows)
    earlier = write_dataset(tmp_path / "earlier", num_items=75, num_users=30)
    before = {
        name: write_graph(
            tmp_path / f"before-{name}", dataset=earlier, features=fewer, k=3, **SETTINGS[name]
        )
        for name in ("update", "ann-update")
    }
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    build(tmp_path / "one", dataset, features, before)
    run_ranks(build, 2, tmp_path / "two", dataset, features, before)
    for name in SETTINGS:
        alone = artifacts.read(tmp_path / "one" / name)
        together = artifacts.verify(tmp_path / "two" / name)
        assert together.identity == alone.identity, name
        assert together.facts == alone.facts
    for name in before:
        assert artifacts.read(tmp_path / "two" / name).facts["num_updated"] > 20
    assert artifacts.read(tmp_path / "two" / "ann-update").facts["num_added"] == 16
