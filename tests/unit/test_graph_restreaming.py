"""The streaming partitioner: few edges cut, balance kept, nothing but blocks of edges."""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.data.schema import INTERACTIONS
from alignrec.distributed.process_group import Rank
from alignrec.graph import edges, restreaming
from alignrec.graph.edges import GraphStreams, Similar, count_degrees
from alignrec.graph.partition import HashPartitioner, Partitioner
from alignrec.graph.restreaming import StreamingPartitioner, place
from alignrec.graph.scattering import scatter_edges
from alignrec.graph.schema import ITEM, NODE_TYPES, RATES, REV_RATES, SIMILAR, USER

NUM_USERS, NUM_ITEMS = 900, 600


def clustered_graph(folder: Path, *, clusters: int = 30, noise: float = 0.2) -> GraphStreams:
    """Users of a cluster mostly share its items; item ids and cluster have nothing in common."""
    rng = np.random.default_rng(0)
    user_cluster = rng.integers(clusters, size=NUM_USERS)
    item_cluster = rng.permutation(np.arange(NUM_ITEMS) % clusters)
    pairs = set()
    for user, cluster in enumerate(user_cluster.tolist()):
        near = np.flatnonzero(item_cluster == cluster)
        for _ in range(int(rng.integers(30))):  # some users have none
            item = rng.integers(NUM_ITEMS) if rng.random() < noise else rng.choice(near)
            pairs.add((user, int(item)))
    users, items = np.array(sorted(pairs)).T
    columns = {
        "user_index": users,
        "item_index": items,
        "rating": pa.nulls(len(users), pa.float32()),
        "timestamp": pa.nulls(len(users), pa.int64()),
    }
    path = folder / "train.parquet"
    pq.write_table(pa.table(columns, schema=INTERACTIONS), path, row_group_size=1000)
    joined = np.argsort(item_cluster, kind="stable").reshape(clusters, -1)
    similar = {i: np.setdiff1d(row, i)[:3] for row in joined for i in row}
    indices = np.concatenate([similar[i] for i in range(NUM_ITEMS)]).astype(np.int32)
    matrix = Similar(3 * np.arange(NUM_ITEMS + 1), indices, np.full(len(indices), 0.3, np.float32))
    return GraphStreams(path, count_degrees(path, num_users=900, num_items=600), matrix)


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> GraphStreams:
    return clustered_graph(tmp_path_factory.mktemp("graph"))


def cut_and_balance(
    graph: GraphStreams, partitioner: Partitioner, folder: Path, parts: int
) -> tuple[dict[str, float], dict[str, float]]:
    assigned = partitioner.assign(graph, parts)
    scattered = scatter_edges(graph, assigned, folder, num_partitions=parts, rank=Rank())
    facts = scattered.facts(assigned, parts)
    return facts["edge_cut"], facts["balance"]


@pytest.mark.parametrize("parts", [2, 5, 8])
def test_beats_hash_on_a_clustered_graph_and_is_even(
    graph: GraphStreams, tmp_path: Path, parts: int
) -> None:
    streaming = StreamingPartitioner(0, with_similar=True, work=tmp_path / "work")
    cut, balance = cut_and_balance(graph, streaming, tmp_path / "edges", parts)
    hashed, _ = cut_and_balance(graph, HashPartitioner(0), tmp_path / "hashed", parts)
    name = "__".join(RATES)
    # Noise runs to a random part: no partition could cut less than 0.2 * (1 - 1 / parts).
    assert cut[name] < 0.2 + 0.5 * (hashed[name] - 0.2)
    assert cut["__".join(SIMILAR)] < 0.5 * hashed["__".join(SIMILAR)]
    # 5 % of room, weight 1 for each node beside its edges, and one node that did not fit.
    for edge_type in (RATES, REV_RATES):
        assert balance["__".join(edge_type)] < 1.2
    assert not (tmp_path / "work").exists()


def test_weight_is_within_the_bound(graph: GraphStreams, tmp_path: Path) -> None:
    parts = StreamingPartitioner(0, with_similar=False, work=tmp_path / "w").assign(graph, 6)
    for node_type in NODE_TYPES:
        weight = 1 + graph.degree[node_type]
        loads = np.bincount(parts[node_type], weight, minlength=6)
        assert loads.max() <= 1.05 * weight.sum() / 6 + weight.max()
        assert parts[node_type].dtype == np.int32


def test_same_seed_same_parts(graph: GraphStreams, tmp_path: Path) -> None:
    first = StreamingPartitioner(3, with_similar=True, work=tmp_path / "w").assign(graph, 4)
    again = StreamingPartitioner(3, with_similar=True, work=tmp_path / "w").assign(graph, 4)
    other = StreamingPartitioner(4, with_similar=True, work=tmp_path / "w").assign(graph, 4)
    for node_type in NODE_TYPES:
        np.testing.assert_array_equal(first[node_type], again[node_type])
        assert (first[node_type] != other[node_type]).any()


@pytest.mark.parametrize("block_edges", [130, 1 << 17])
@pytest.mark.parametrize("row_group_size", [70, 100_000])
@pytest.mark.parametrize("buckets", [1, 40])
def test_same_parts_whatever_the_files(
    graph: GraphStreams,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    block_edges: int,
    row_group_size: int,
    buckets: int,
) -> None:
    monkeypatch.setattr(restreaming, "_BLOCK_NODES", 50)
    monkeypatch.setattr(restreaming, "_BLOCK_EDGES", 400)
    monkeypatch.setattr(restreaming, "_CLUSTER_PASSES", 2)
    wanted = StreamingPartitioner(3, with_similar=True, work=tmp_path / "w").assign(graph, 4)
    path = tmp_path / "train.parquet"
    pq.write_table(pq.read_table(graph.interactions), path, row_group_size=row_group_size)
    monkeypatch.setattr(edges, "BLOCK_EDGES", block_edges)
    monkeypatch.setattr(restreaming, "_BUCKET_EDGES", 1)
    monkeypatch.setattr(restreaming, "_MAX_BUCKETS", buckets)
    same = dataclasses.replace(graph, interactions=path)
    found = StreamingPartitioner(3, with_similar=True, work=tmp_path / "w").assign(same, 4)
    for node_type in NODE_TYPES:
        np.testing.assert_array_equal(found[node_type], wanted[node_type])


def test_the_number_of_files_is_bounded(
    graph: GraphStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restreaming, "_BUCKET_EDGES", 1)
    monkeypatch.setattr(restreaming, "_MAX_BUCKETS", 20)
    restreaming.EdgeRows(graph, tmp_path / "work", with_similar=False)
    assert 10 < len(list((tmp_path / "work").iterdir())) <= 21


@pytest.mark.parametrize("size", [1, 17, 5000])
def test_rows_are_all_neighbours_of_all_nodes(
    graph: GraphStreams, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr(edges, "BLOCK_EDGES", 130)
    monkeypatch.setattr(restreaming, "_BUCKET_EDGES", 700)
    monkeypatch.setattr(restreaming, "_BLOCK_EDGES", 1000)
    rows = restreaming.EdgeRows(graph, tmp_path / "work", with_similar=True)
    pairs = {USER: set(), ITEM: set()}
    similar = set()
    for node_type in NODE_TYPES:
        next_node = 0
        for block in rows.read(node_type, size):
            assert block.first == next_node
            assert 0 < len(block.indptr) - 1 <= size
            # The last node of a block may have more edges than fit.
            assert block.indptr[-2] <= 1000
            next_node += len(block.indptr) - 1
            ids = block.first + np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
            pairs[node_type] |= set(zip(ids.tolist(), block.neighbors.tolist(), strict=True))
            if block.similar_indptr is not None and block.similar is not None:
                counts = np.diff(block.similar_indptr)
                ids = block.first + np.repeat(np.arange(len(counts)), counts)
                similar |= set(zip(ids.tolist(), block.similar.tolist(), strict=True))
        assert next_node == graph.num_nodes[node_type]
    table = pq.read_table(graph.interactions)
    expected = set(zip(*(table[c].to_pylist() for c in ("user_index", "item_index")), strict=True))
    assert pairs[USER] == expected
    assert pairs[ITEM] == {(item, user) for user, item in expected}
    assert len(similar) == 3 * NUM_ITEMS


def test_place_prefers_good_scores_and_keeps_room() -> None:
    score = np.array([[5.0, 1.0], [9.0, 1.0], [4.0, 3.0], [1.0, 0.0]])
    placed = place(score, np.array([1, 1, 1, 1]), np.array([2.0, 5.0]))
    assert placed.tolist() == [0, 0, 1, 1]


def test_place_without_room_fills_what_is_emptiest() -> None:
    score = np.tile([3.0, 2.0, 1.0], (6, 1))
    placed = place(score, np.full(6, 2), np.array([2.0, 3.0, 2.0]))
    assert (np.bincount(placed, minlength=3) >= 1).all()
    heavy = place(np.ones((1, 2)), np.array([10]), np.array([1.0, 2.0]))
    assert heavy.tolist() == [1]
