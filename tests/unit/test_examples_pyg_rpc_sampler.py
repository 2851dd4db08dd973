"""examples/pyg_rpc_sampler.py: PyG's stores over our partitions, and where the rest cannot run."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from alignrec.data.schema import read_interactions
from alignrec.errors import UserError
from alignrec.graph.schema import ITEM, RATES, USER
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "pyg_rpc_sampler.py"
PARTS = 3


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyg_rpc_sampler", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    root = tmp_path_factory.mktemp("pyg")
    dataset = write_dataset(root / "dataset", num_items=30, num_users=25)
    features = write_features(root / "features", num_items=30)
    graph = write_graph(
        root / "graph", dataset=dataset, features=features, k=4, num_partitions=PARTS
    )
    return dataset, features, graph


def test_the_stores_answer_as_the_loaders_ask(
    example: ModuleType, folders: tuple[Path, Path, Path]
) -> None:
    dataset, features, graph = folders
    rows = torch.from_numpy(np.load(features / "features.npy"))
    users, items = read_interactions(dataset, "train")
    degree = torch.from_numpy(np.bincount(users, minlength=25)).float()
    owned: dict[str, list[int]] = {USER: [], ITEM: []}
    edges = 0
    for partition in range(PARTS):
        stored, lists = example.open_partition(graph, partition)
        for node_type, wanted in ((ITEM, rows), (USER, degree[:, None])):
            ids = stored.get_global_id(node_type)
            found = stored.get_tensor_from_global_id(
                index=ids.flip(0), group_name=node_type, attr_name="x"
            )
            torch.testing.assert_close(found, wanted[ids.flip(0)])
            assert (lists.get_partition_ids_from_nids(ids, node_type) == partition).all()
            owned[node_type] += ids.tolist()
        assert not stored.has_edge_attr()
        index = lists.get_edge_index(edge_type=RATES, layout="coo")
        assert {tensor.dtype for tensor in index} == {torch.int64}
        edges += index[0].numel()
    assert sorted(owned[USER]) == list(range(25))
    assert sorted(owned[ITEM]) == list(range(30))
    assert edges == len(items)


@pytest.mark.parametrize("version", ["2.5.3", "2.8.0", "2.8.1", "2.10.0.dev1"])
def test_versions_in_which_it_does_not_work_are_refused(example: ModuleType, version: str) -> None:
    with pytest.raises(UserError, match=rf"torch_geometric {version} cannot sample"):
        example.check_installed(version, has_pyg_lib=True)


def test_without_pyg_lib_it_says_where_to_find_it(example: ModuleType) -> None:
    with pytest.raises(UserError, match="pyg-lib is not installed"):
        example.check_installed("2.7.0", has_pyg_lib=False)
    example.check_installed("2.6.1", has_pyg_lib=True)


def test_where_it_cannot_run_it_ends_with_one_line(
    example: ModuleType,
    folders: tuple[Path, Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(folders[2])])
    monkeypatch.setattr(example.torch_geometric, "__version__", "2.8.1")
    assert example.main() == 2
    told = capsys.readouterr().err
    assert told.startswith("error: torch_geometric 2.8.1")
    assert told.count("\n") == 1
