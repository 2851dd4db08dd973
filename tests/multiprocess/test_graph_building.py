"""The graph stage on several ranks writes what it writes on one."""

from pathlib import Path

import pytest

from alignrec import artifacts
from alignrec.graph import building
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks


def build(folder: Path, dataset: Path, features: Path) -> None:
    building._CHUNK_ROWS = 8  # several chunks for each rank
    write_graph(folder, dataset=dataset, features=features, k=3)


@pytest.mark.multiprocess
def test_two_ranks_write_the_same_bytes_as_one(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=50, num_users=30)
    features = write_features(tmp_path / "features", num_items=50)
    run_ranks(build, 2, tmp_path / "two", dataset, features)
    alone = write_graph(tmp_path / "one", dataset=dataset, features=features, k=3)
    assert artifacts.read(tmp_path / "two").identity == artifacts.read(alone).identity
