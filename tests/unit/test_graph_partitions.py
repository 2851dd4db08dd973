"""Partitions: every node and edge once, the same each time, and readable by PyG."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignrec import artifacts
from alignrec.data.schema import read_interactions
from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank
from alignrec.errors import UserError
from alignrec.graph import layout, schema
from alignrec.graph.schema import EDGE_TYPES, ITEM, NODE_TYPES, RATES, REV_RATES, SIMILAR, USER
from alignrec.graph.stores import DistributedFeatures, PartitionedGraph
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph

PARTS = 3


@pytest.fixture(scope="module", params=["metis", "streaming", "hash"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("partitions")
    dataset = write_dataset(root / "dataset", num_items=30, num_users=25)
    features = write_features(root / "features", num_items=30, zero_rows=(4,))
    graph = write_graph(
        root / "graph",
        dataset=dataset,
        features=features,
        k=3,
        num_partitions=PARTS,
        partition_method=request.param,
    )
    return dataset, features, graph


def all_edges(dataset: Path, graph: Path) -> dict[tuple[str, str, str], set[tuple[int, int]]]:
    users, items = read_interactions(dataset, "train")
    rates = set(zip(users.tolist(), items.tolist(), strict=True))
    with np.load(schema.similar_path(graph)) as file:
        rows = np.repeat(np.arange(len(file["indptr"]) - 1), np.diff(file["indptr"]))
        similar = set(zip(file["indices"].tolist(), rows.tolist(), strict=True))
    return {RATES: rates, REV_RATES: {(i, u) for u, i in rates}, SIMILAR: similar}


def test_pyg_reads_every_edge_once_and_features(folders: Any) -> None:
    dataset, features, graph = folders
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the package is deprecated as a whole
        from torch_geometric.distributed import LocalFeatureStore, LocalGraphStore
    rows = np.load(features / "features.npy")
    seen: dict[tuple[str, str, str], list[tuple[int, int]]] = {t: [] for t in EDGE_TYPES}
    nodes: dict[str, list[int]] = {t: [] for t in NODE_TYPES}
    for partition in range(PARTS):
        store = LocalGraphStore.from_partition(str(graph), partition)
        table = LocalFeatureStore.from_partition(str(graph), partition)
        for attribute in store.get_all_edge_attrs():
            edge_type = attribute.edge_type
            source, target = store.get_edge_index(attribute)
            pairs = list(zip(source.tolist(), target.tolist(), strict=True))
            seen[edge_type] += pairs
            assert pairs == sorted(pairs, key=lambda pair: pair[::-1])
            owners = store.get_partition_ids_from_nids(target, edge_type[2])
            assert (owners == partition).all()
            weight = table.get_tensor(group_name=edge_type, attr_name="edge_attr")
            assert weight.shape == (len(pairs), 1)
            ids = table.get_global_id(edge_type)
            assert (store.get_partition_ids_from_eids(ids, edge_type) == partition).all()
        offsets = dict(zip(NODE_TYPES, layout.read_meta(graph)["node_offset"], strict=True))
        for node_type in NODE_TYPES:
            nodes[node_type] += (table.get_global_id(node_type) - offsets[node_type]).tolist()
        ids = table.get_global_id(ITEM) - offsets[ITEM]
        np.testing.assert_array_equal(table.get_tensor(group_name=ITEM, attr_name="x"), rows[ids])
    assert {t: len(found) for t, found in seen.items()} == {
        t: len(set(found)) for t, found in seen.items()
    }
    assert {t: set(found) for t, found in seen.items()} == all_edges(dataset, graph)
    assert sorted(nodes[USER]) == list(range(25))
    assert sorted(nodes[ITEM]) == list(range(30))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_own_every_list_once_with_whole_graph_weights(folders: Any, world_size: int) -> None:
    dataset, _, graph = folders
    users, items = read_interactions(dataset, "train")
    degree = {USER: np.bincount(users, minlength=25), ITEM: np.bincount(items, minlength=30)}
    edges = {t: [] for t in EDGE_TYPES}
    for index in range(world_size):
        rank = Rank(index=index, world_size=world_size)
        store = PartitionedGraph.open(graph, rank)
        for node_type in NODE_TYPES:
            own = store.owned[node_type]
            assert (store.owner_of(node_type, own) == index).all()
            assert (store.local_rows(node_type, own) == torch.arange(len(own))).all()
            np.testing.assert_array_equal(store.degree[node_type], degree[node_type][own])
        for edge_type in EDGE_TYPES:
            lists = store.neighbors[edge_type]
            targets = store.owned[edge_type[2]].repeat_interleave(lists.indptr.diff())
            edges[edge_type] += list(zip(lists.source.tolist(), targets.tolist(), strict=True))
            if edge_type == RATES:
                product = degree[USER][lists.source] * degree[ITEM][targets]
                np.testing.assert_allclose(lists.weight, product**-0.5, rtol=1e-6)
    assert all(len(found) == len(set(found)) for found in edges.values())
    assert {t: set(found) for t, found in edges.items()} == all_edges(dataset, graph)


def test_same_seed_same_bytes(folders: Any, tmp_path: Path) -> None:
    dataset, features, graph = folders
    config = artifacts.read(graph, "graph").config
    again = write_graph(tmp_path / "again", dataset=dataset, features=features, **config)
    assert artifacts.read(again, "graph").identity == artifacts.verify(graph).identity


def test_users_of_one_taste_share_items_and_go_together(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=120, num_users=100)
    features = write_features(tmp_path / "features", num_items=120)
    cut = {}
    for method in ("metis", "streaming", "hash"):
        graph = write_graph(
            tmp_path / method,
            dataset=dataset,
            features=features,
            num_partitions=4,
            partition_method=method,
            partition_similar_edges=False,
        )
        facts = artifacts.read(graph, "graph").facts
        cut[method] = facts["edge_cut"]["user__rates__item"]
        assert facts["balance"]["item__rev_rates__user"] < 1.6
    assert cut["metis"] < 0.6 * cut["hash"]
    assert cut["streaming"] < 0.7 * cut["hash"]


def test_auto_is_metis_up_to_a_number_of_edges(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=30, num_users=25)
    inputs = {"dataset": dataset, "features": write_features(tmp_path / "f", num_items=30)}
    facts = {}
    for limit in (10_000, 100):
        graph = write_graph(tmp_path / str(limit), **inputs, metis_edges=limit)
        facts[limit] = artifacts.read(graph, "graph").facts["partition_method"]
    assert facts == {10_000: "metis", 100: "streaming"}


def test_stores_speak_pygs_interface(folders: Any) -> None:
    dataset, _, graph = folders
    store = PartitionedGraph.open(graph, Rank())
    edges = all_edges(dataset, graph)
    for attribute in store.get_all_edge_attrs():
        source, target = store.get_edge_index(attribute)
        found = set(zip(source.tolist(), target.tolist(), strict=True))
        assert found == edges[attribute.edge_type]
        with pytest.raises(RuntimeError, match="read-only"):
            store.put_edge_index((source, target), attribute)
    features = DistributedFeatures(store, Exchange(Rank()))
    assert features.get_tensor_size(group_name=ITEM, attr_name="x") == (30, 12)
    with pytest.raises(ValueError, match="by index"):
        features.get_tensor(group_name=ITEM, attr_name="x", index=None)


def test_features_in_half_precision(tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "dataset", num_items=30, num_users=25)
    features = write_features(tmp_path / "features", num_items=30)
    rows = np.load(features / "features.npy")
    rows[3, 0] = 1e6
    np.save(features / "features.npy", rows)
    graph = write_graph(
        tmp_path / "graph", dataset=dataset, features=features, partition_features="float16"
    )
    store = PartitionedGraph.open(graph, Rank())
    found = store.features(store.local_rows(ITEM, torch.arange(30)))
    assert found.dtype == torch.float16
    expected = rows.astype(np.float64).clip(-65504, 65504)
    np.testing.assert_allclose(found.double(), expected, rtol=1e-3, atol=1e-6)
    content = DistributedFeatures(store, Exchange(Rank())).content(torch.arange(30))
    torch.testing.assert_close(content, found.float())


def test_missing_metadata_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"META\.json cannot be read"):
        PartitionedGraph.open(tmp_path, Rank())
