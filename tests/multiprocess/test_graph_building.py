"""The graph stage on several ranks writes what it writes on one."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from alignrec import artifacts
from alignrec.data.schema import interactions_path
from alignrec.graph import searching
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks


def build(folder: Path, dataset: Path, features: Path, settings: dict[str, Any]) -> None:
    searching._CHUNK_ROWS = 8  # several chunks for each rank
    write_graph(folder, dataset=dataset, features=features, k=3, **settings)


@pytest.mark.multiprocess
@pytest.mark.parametrize("method", ["exact", "ann", "update", "streaming"])
def test_two_ranks_write_the_same_bytes_as_one(
    tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(searching, "_CHUNK_ROWS", 8)
    dataset = write_dataset(tmp_path / "dataset", num_items=90, num_users=30)
    features = write_features(tmp_path / "features", num_items=90)
    log = interactions_path(dataset, "train")
    pq.write_table(pq.read_table(log), log, row_group_size=20)  # some for each rank
    settings: dict[str, Any] = {"knn": {"method": "ann" if method == "ann" else "exact"}}
    if method == "streaming":
        settings |= {"partition_method": "streaming", "num_partitions": 5}
    if method == "update":
        earlier = write_dataset(tmp_path / "earlier", num_items=70, num_users=30)
        before = write_graph(
            tmp_path / "before",
            dataset=earlier,
            features=write_features(tmp_path / "fewer", num_items=70, zero_rows=(4,)),
            k=3,
        )
        settings["knn"]["previous"] = str(before)
    run_ranks(build, 2, tmp_path / "two", dataset, features, settings)
    alone = write_graph(tmp_path / "one", dataset=dataset, features=features, k=3, **settings)
    assert artifacts.read(tmp_path / "two").identity == artifacts.read(alone).identity
