"""Samples: without replacement, evenly spread, and unbiased for the whole neighbourhood."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank
from alignrec.graph.drawing import choose_without_replacement, sample_lists
from alignrec.graph.hashing import hash_ids, salt, uniform, uniform_below
from alignrec.graph.loader import NodeBatchLoader, TripleLoader, TripleSettings
from alignrec.graph.sampler import NeighborSampler, NodeTable
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER
from alignrec.graph.stores import NeighborLists, PartitionedGraph
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.propagation import batch_propagation, dense_propagation, random_parameters

NUM_USERS, NUM_ITEMS = 20, 24


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sampler")
    dataset = write_dataset(root / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    features = write_features(root / "features", num_items=NUM_ITEMS)
    graph = write_graph(root / "graph", dataset=dataset, features=features, k=4)
    return {"dataset": dataset, "features": features, "graph": graph}


def test_hashes_are_the_same_alone_and_together() -> None:
    ids = torch.arange(-5, 1000)
    key = salt(3, 1)
    together = hash_ids(ids, key)
    assert together.tolist() == [int(hash_ids(ids[i : i + 1], key)) for i in range(len(ids))]
    assert len(set(together.tolist())) == len(ids)
    assert salt(1, 2) != salt(2, 1) != salt(1, 2, 0)


def test_hashes_are_uniform() -> None:
    """Mean, variance and every bit of 100,000 hashes lie within five standard errors."""
    n = 100_000
    hashes = hash_ids(torch.arange(n), salt(0))
    values = uniform(hashes)
    assert abs(float(values.mean()) - 0.5) < 5 * math.sqrt(1 / 12 / n)
    for bit in range(64):
        assert abs(float(((hashes >> bit) & 1).float().mean()) - 0.5) < 5 * 0.5 / math.sqrt(n)
    counts = torch.bincount(uniform_below(hashes, 7), minlength=7).double()
    assert float((counts - n / 7).abs().max()) < 5 * math.sqrt(n / 7)


def test_uniform_below_never_reaches_the_bound() -> None:
    largest = torch.tensor([-1])  # all bits set: the largest of all hashes
    for bound in (1, 2, 3, 1000, 2**31 - 1, 2**31, 2**40 + 1):
        assert int(uniform_below(largest, bound)) == bound - 1


@pytest.mark.parametrize(("length", "k"), [(5, 1), (5, 2), (6, 5)])
def test_every_subset_is_equally_likely(length: int, k: int) -> None:
    rows = 30_000
    keys = hash_ids(torch.arange(rows), salt(9))
    chosen = choose_without_replacement(keys, torch.full((rows,), length), k=k)
    subsets = torch.sort(chosen, dim=0).values
    assert (subsets.diff(dim=0) > 0).all()
    assert 0 <= int(subsets.min()) <= int(subsets.max()) < length
    codes = (subsets * (length ** torch.arange(k))[:, None]).sum(0)
    counts = torch.unique(codes, return_counts=True)[1].double()
    assert len(counts) == math.comb(length, k)
    expected = rows / math.comb(length, k)
    assert float((counts - expected).abs().max()) < 5 * math.sqrt(expected)


def test_lists_come_whole_or_scaled() -> None:
    lengths = torch.tensor([0, 3, 8, 1])
    indptr = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    lists = NeighborLists(indptr, torch.arange(100, 112), torch.ones(12))
    asked = torch.tensor([2, 0, 1, 2, 3])
    fanout = torch.tensor([4, 4, 4, -1, 4])
    taken, source, weight = sample_lists(lists, asked, fanout, torch.arange(5))
    assert taken.tolist() == [4, 0, 3, 8, 1]
    sampled = source[:4]
    assert len(set(sampled.tolist())) == 4
    assert set(sampled.tolist()) <= set(range(103, 111))
    assert source[4:].tolist() == [100, 101, 102, *range(103, 111), 111]
    assert weight.tolist() == [2.0] * 4 + [1.0] * 12


def test_node_table_numbers_by_first_appearance() -> None:
    table = NodeTable(50)
    assert table.positions(torch.tensor([7, 3, 7, 9])).tolist() == [0, 1, 0, 2]
    assert table.positions(torch.tensor([3, 40, 40, 7])).tolist() == [1, 3, 3, 0]
    assert table.ids().tolist() == [7, 3, 9, 40]
    table.clear()
    assert len(table) == 0
    assert table.positions(torch.tensor([40])).tolist() == [0]


def sampled_means(
    folders: dict[str, Path], fanout: tuple[int, ...], similar: tuple[int, ...], draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard error of all users' and items' h over many seeds."""
    graph = PartitionedGraph.open(folders["graph"], Rank())
    parameters = random_parameters(NUM_USERS, NUM_ITEMS, 12)
    values = []
    for node_type, count in ((USER, NUM_USERS), (ITEM, NUM_ITEMS)):
        rows = []
        loader = NodeBatchLoader(
            graph,
            Exchange(Rank()),
            node_type,
            torch.arange(count),
            num_neighbors=fanout,
            similar_neighbors=similar,
            batch_size=count,
        )
        for draw in range(draws):
            loader.node_sampler.epoch = draw
            (batch,) = loader
            h = batch_propagation(batch, parameters)
            seeds = batch[node_type].seed_index
            by_id, by_content = (
                (h.user_id, h.user_mm) if node_type == USER else (h.item_id, h.item_mm)
            )
            rows.append(torch.cat([by_id[seeds], by_content[seeds]], 1).numpy())
        values.append(np.stack(rows))
    stacked = np.concatenate(values, axis=1)
    return stacked.mean(0), stacked.std(0) / math.sqrt(draws)


@pytest.mark.parametrize(("fanout", "similar"), [((2, 2), (2,)), ((1, 2, 1), (1,)), ((2,), (1, 1))])
def test_sampled_propagation_is_unbiased(
    folders: dict[str, Path], fanout: tuple[int, ...], similar: tuple[int, ...]
) -> None:
    """The mean over 80 samples is within five standard errors of the dense value."""
    mean, error = sampled_means(folders, fanout, similar, 80)
    expected = dense_propagation(
        random_parameters(NUM_USERS, NUM_ITEMS, 12),
        dataset=folders["dataset"],
        features=folders["features"],
        graph=folders["graph"],
        num_layers=len(fanout),
        content_layers=len(similar),
    )
    whole = np.concatenate(
        [
            np.concatenate([expected.user_id, expected.user_mm], 1),
            np.concatenate([expected.item_id, expected.item_mm], 1),
        ]
    )
    assert error.max() > 0.01
    assert (np.abs(mean - whole) / np.maximum(error, 1e-6)).max() < 5


def loader(folders: dict[str, Path], **changes: Any) -> TripleLoader:
    graph = PartitionedGraph.open(folders["graph"], Rank())
    values = {
        "num_neighbors": (2, 2),
        "similar_neighbors": (2,),
        "global_batch_size": 25,
        **changes,
    }
    return TripleLoader(graph, Exchange(Rank()), TripleSettings(**values))


def test_batch_has_the_documented_fields(folders: dict[str, Path]) -> None:
    for batch in loader(folders).epoch(0):
        size = batch.num_triples
        assert batch[USER].src_index.shape == (size,)
        assert batch[ITEM].dst_pos_index.shape == batch[ITEM].dst_neg_index.shape == (size,)
        for node_type in (USER, ITEM):
            assert len(batch[node_type].n_id.unique()) == len(batch[node_type].n_id)
        for edge_type, hops in ((RATES, 2), (REV_RATES, 2), (SIMILAR, 1)):
            edges = batch[edge_type].edge_index
            assert edges.shape == (2, sum(batch[edge_type].num_sampled_edges))
            assert batch[edge_type].weight.shape == edges.shape[1:]
            assert len(batch[edge_type].num_sampled_edges) == hops
            assert int(edges[0].max()) < len(batch[edge_type[0]].n_id)
        rows = np.load(folders["features"] / "features.npy")
        wanted = batch[ITEM].n_id[batch[ITEM].content_index]
        np.testing.assert_array_equal(batch[ITEM].content_x, rows[wanted])


def test_without_content_there_are_no_similar_edges(folders: dict[str, Path]) -> None:
    batch = next(loader(folders, similar_neighbors=()).epoch(0))
    assert batch[SIMILAR].edge_index.shape == (2, 0)
    assert batch[ITEM].content_index.shape == (0,)
    assert "content_x" not in batch[ITEM]


def test_epochs_differ_and_repeat(folders: dict[str, Path]) -> None:
    def triples(epoch: int, first_step: int = 0) -> list[list[int]]:
        result = []
        for batch in loader(folders).epoch(epoch, first_step=first_step):
            users = batch[USER].n_id[batch[USER].src_index].tolist()
            result.append(
                [batch.step, *users, *batch[ITEM].n_id[batch[ITEM].dst_neg_index].tolist()]
            )
        return result

    assert triples(0) == triples(0)
    assert triples(0) != triples(1)
    assert triples(1)[2:] == triples(1, first_step=2)


def test_iterating_leaves_the_global_generator_alone(folders: dict[str, Path]) -> None:
    state = torch.get_rng_state()
    next(loader(folders).epoch(0))
    assert torch.equal(torch.get_rng_state(), state)


def test_impossible_fanouts_are_refused(folders: dict[str, Path]) -> None:
    graph = PartitionedGraph.open(folders["graph"], Rank())
    for fanout, similar in (((2, 0), ()), ((-2,), ()), ((), (3,))):
        with pytest.raises(ValueError, match=r"hop|fanout"):
            NeighborSampler(
                graph, Exchange(Rank()), num_neighbors=fanout, similar_neighbors=similar, seed=0
            )
