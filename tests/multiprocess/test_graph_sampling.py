"""Batches on several ranks: full fanout is the whole graph, and ranks do not change the sample."""

import contextlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from alignrec.data.schema import read_interactions
from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank, new_group, process_group
from alignrec.graph.loader import NodeBatchLoader, TripleLoader, TripleSettings, prefetch
from alignrec.graph.schema import ITEM, USER
from alignrec.graph.stores import DistributedFeatures, PartitionedGraph
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks
from alignrec.testing.propagation import batch_propagation, dense_propagation, random_parameters

NUM_USERS, NUM_ITEMS, NUM_FEATURES = 50, 40, 12
# graph, fanout, layers
RUNS = [("graph2", -1, 2), ("graph2", -1, 3), ("graph1", 2, 2), ("graph2", 2, 2), ("graph4", 2, 2)]
# Fanouts of user-item hops and content layers: a row's length differs from round to round; all
# neighbours of one type beside some of another; more than travel as rows of one length.
FANOUTS = {"rows": ((3, 2), (4,)), "mixed": ((3, -1), (4,)), "ragged": ((40, 2), (1, 3))}
# Bytes for samples and for content rows of other ranks: 5 of each round, and 5.
CACHES = {"none": (0, 0), "few": (2 * 5 * 44, 5 * NUM_ITEMS + 5 * 64), "all": (1 << 27, 1 << 27)}
CACHED_RUNS = [
    ("rows", "none"),
    ("rows", "few"),
    ("rows", "all"),
    ("mixed", "few"),
    ("ragged", "few"),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("graph")
    dataset = write_dataset(folder / "dataset", num_items=NUM_ITEMS, num_users=NUM_USERS)
    features = write_features(folder / "features", num_items=NUM_ITEMS, zero_rows=(0, 7))
    graphs = {
        f"graph{parts}": write_graph(
            folder / f"graph{parts}", dataset=dataset, features=features, k=4, num_partitions=parts
        )
        for parts in (1, 2, 4)
    }
    return {"dataset": dataset, "features": features, **graphs}


def settings(fanout: int, layers: int = 2, batch: int = 80) -> TripleSettings:
    return TripleSettings((fanout,) * layers, (fanout,), batch, num_negatives=2, seed=3)


def cached_settings(fanouts: str, caches: str) -> TripleSettings:
    sample_cache_bytes, cache_bytes = CACHES[caches]
    return TripleSettings(
        *FANOUTS[fanouts],
        80,
        num_negatives=2,
        seed=3,
        cache_bytes=cache_bytes,
        sample_cache_bytes=sample_cache_bytes,
    )


def collect_rows(graph: Path, settings: TripleSettings, rank: Rank) -> dict[str, Any]:
    """Return this rank's seeds of an epoch and their representations."""
    parameters = random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES)
    result: dict[str, Any] = {"triples": [], "totals": []}
    rows: dict[str, list[torch.Tensor]] = {USER: [], ITEM: []}
    exchange = Exchange(rank, new_group(timeout_seconds=60))
    store = PartitionedGraph.open(graph, rank)
    loader = TripleLoader(store, exchange, settings)
    if (
        max(settings.num_neighbors) > 0
    ):  # samples of one epoch are remembered, and must not be used in the next
        list(loader.epoch(0))
    batches = prefetch(loader.epoch(1), depth=2, traffic=loader.traffic)
    with contextlib.closing(batches):
        for batch in batches:
            h = batch_propagation(batch, parameters)
            user, positive = batch[USER].src_index, batch[ITEM].dst_pos_index
            negative = batch[ITEM].dst_neg_index
            item = torch.cat([positive, negative.ravel()])
            users, items = batch[USER].n_id, batch[ITEM].n_id
            rows[USER].append(torch.cat([users[user, None], h.user_id[user], h.user_mm[user]], 1))
            rows[ITEM].append(torch.cat([items[item, None], h.item_id[item], h.item_mm[item]], 1))
            triples = torch.cat([users[user, None], items[positive, None], items[negative]], 1)
            result["triples"] += [(batch.step, *triple) for triple in triples.tolist()]
            result["totals"].append((batch.step, len(user), batch.num_triples))
    result["traffic"] = loader.traffic.take()
    return result | {kind: torch.cat(parts).numpy() for kind, parts in rows.items()}


def collect_nodes(graph: Path, rank: Rank) -> dict[str, Any]:
    """Return h of users, asked for by rank: rank r wants r users."""
    parameters = random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES)
    exchange = Exchange(rank, new_group(timeout_seconds=60))
    store = PartitionedGraph.open(graph, rank)
    wanted = torch.arange(rank.index) * 7
    loader = NodeBatchLoader(
        store, exchange, USER, wanted, num_neighbors=(-1, -1), similar_neighbors=(-1,), batch_size=1
    )
    rows = [torch.empty(0, 4)]
    for batch in loader:
        rows.append(batch_propagation(batch, parameters).user_id[batch[USER].seed_index])
    features = DistributedFeatures(store, exchange)
    items = torch.tensor([5, 39, 5, 0] * rank.index, dtype=torch.int64)
    return {
        "wanted": wanted.numpy(),
        "rows": torch.cat(rows).numpy(),
        "steps": len(rows) - 1,
        "items": items.numpy(),
        "x": features.get_tensor(group_name=ITEM, attr_name="x", index=items).numpy(),
        "degree": features.get_tensor(group_name=ITEM, attr_name="degree", index=items).numpy(),
    }


def run_all(graphs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """All that the tests want of one rank, in one go: starting ranks takes longer than the work."""
    with process_group(timeout_seconds=60) as rank:
        results = {
            f"{name} {fanout} {layers}": collect_rows(graphs[name], settings(fanout, layers), rank)
            for name, fanout, layers in RUNS
        }
        graph = graphs["graph4" if rank.world_size > 1 else "graph1"]
        for fanouts, caches in CACHED_RUNS:
            found = collect_rows(graph, cached_settings(fanouts, caches), rank)
            results[f"{fanouts} {caches}"] = found
        return results | {"nodes": collect_nodes(graphs["graph4"], rank)}


@pytest.fixture(scope="module")
def ranks(inputs: dict[str, Path]) -> dict[int, list[dict[str, dict[str, Any]]]]:
    graphs = {name: path for name, path in inputs.items() if name.startswith("graph")}
    return {
        1: [run_all(graphs)],
        2: run_ranks(run_all, 2, graphs),
        3: run_ranks(run_all, 3, graphs),
    }


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("layers", [2, 3])
def test_full_fanout_is_the_whole_graph(
    inputs: dict[str, Path], ranks: Any, world_size: int, layers: int
) -> None:
    """Every seed's representations equal dense propagation; one of 3 ranks owns no partition."""
    expected = dense_propagation(
        random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES),
        dataset=inputs["dataset"],
        features=inputs["features"],
        graph=inputs["graph2"],
        num_layers=layers,
    )
    for kind, values in (
        (USER, torch.cat([expected.user_id, expected.user_mm], 1)),
        (ITEM, torch.cat([expected.item_id, expected.item_mm], 1)),
    ):
        rows = torch.cat([torch.tensor(r[f"graph2 -1 {layers}"][kind]) for r in ranks[world_size]])
        assert len(rows) == NUM_USERS * 6 * (1 if kind == USER else 3)
        torch.testing.assert_close(rows[:, 1:], values[rows[:, 0].long()], atol=1e-6, rtol=0)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_bring_nodes_of_their_own(
    inputs: dict[str, Path], ranks: Any, world_size: int
) -> None:
    """Ranks ask for 0, 1 and 2 users and still make equally many steps."""
    expected = dense_propagation(
        random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES),
        dataset=inputs["dataset"],
        features=inputs["features"],
        graph=inputs["graph4"],
        num_layers=2,
    )
    for index, rank in enumerate(ranks[world_size]):
        found = rank["nodes"]
        assert len(found["rows"]) == index
        assert found["steps"] == world_size - 1
        np.testing.assert_allclose(found["rows"], expected.user_id[found["wanted"]], atol=1e-6)


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_features_are_found_wherever_they_lie(
    inputs: dict[str, Path], ranks: Any, world_size: int
) -> None:
    rows = np.load(inputs["features"] / "features.npy")
    degree = np.bincount(read_interactions(inputs["dataset"], "train")[1], minlength=NUM_ITEMS)
    for index, rank in enumerate(ranks[world_size]):
        found = rank["nodes"]
        assert found["x"].shape == (4 * index, NUM_FEATURES)
        np.testing.assert_array_equal(found["x"], rows[found["items"]])
        np.testing.assert_array_equal(found["degree"], degree[found["items"]])


@pytest.mark.multiprocess
@pytest.mark.parametrize(("parts", "world_size"), [(4, 1), (4, 2), (1, 2), (2, 3), (4, 3)])
def test_ranks_and_partitions_do_not_change_the_sample(
    ranks: Any, parts: int, world_size: int
) -> None:
    """The same triples at each step and the same sampled values for them, wherever they are."""
    (alone,) = ranks[1]
    reference = alone["graph1 2 2"]
    triples = sorted(reference["triples"])
    pairs = {triple[1:3] for triple in triples}
    assert len(triples) == len(pairs) == NUM_USERS * 6
    found = [rank[f"graph{parts} 2 2"] for rank in ranks[world_size]]
    check_same_sample(found, reference)
    for totals in zip(*(rank["totals"] for rank in found), strict=True):
        assert {total[0] for total in totals} == {totals[0][0]}
        assert {total[2] for total in totals} == {sum(total[1] for total in totals)}


@pytest.mark.multiprocess
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize(("fanouts", "caches"), CACHED_RUNS)
def test_caches_do_not_change_the_sample(
    ranks: Any, fanouts: str, caches: str, world_size: int
) -> None:
    name = f"{fanouts} {caches}"
    found = [rank[name] for rank in ranks[world_size]]
    check_same_sample(found, ranks[1][0][name])
    for rank in found:
        samples, rows = (
            rank["traffic"][f"sampling/{rate}"] for rate in ("sample_hit_rate", "cache_hit_rate")
        )
        least = {"none": 0, "few": 0, "all": 0.3}[caches]
        most = {"none": 0, "few": 0.3, "all": 1}[caches]
        assert least <= samples <= most
        assert least <= rows <= most
        assert (rows > 0) == (samples > 0) == (caches != "none")


def check_same_sample(found: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """All ranks' triples, and the sampled values for them, are together those of one rank."""
    triples = sorted(triple for rank in found for triple in rank["triples"])
    assert triples == sorted(reference["triples"])
    for kind in (USER, ITEM):
        rows = np.concatenate([rank[kind] for rank in found])
        np.testing.assert_allclose(ordered(rows), ordered(reference[kind]), atol=1e-6)


def ordered(rows: np.ndarray) -> np.ndarray:
    """Sort rows by node and then values, so that equal sets of rows compare equal."""
    return rows[np.lexsort(rows.round(4).T[::-1])]


@pytest.mark.multiprocess
def test_traffic_is_counted_and_rows_are_found_again(ranks: Any) -> None:
    """Other tests hold that batches with found rows are those of a rank that asks nobody."""
    alone = ranks[1][0]["graph2 -1 2"]["traffic"]
    assert alone["sampling/remote_node_share"] == alone["sampling/remote_row_share"] == 0
    assert alone["sampling/wait_seconds"] > 0
    for rank in ranks[2]:
        traffic = rank["graph2 -1 2"]["traffic"]
        assert 0.2 < traffic["sampling/remote_node_share"] < 0.8
        assert 0.2 < traffic["sampling/remote_row_share"] < 0.8
        # Four steps want nearly all items: they are kept at the second and found from the third.
        assert 0.3 < traffic["sampling/cache_hit_rate"] < 0.6
        assert traffic["sampling/sample_hit_rate"] == 0  # all neighbours: too much to remember
        assert rank["graph2 2 2"]["traffic"]["sampling/sample_hit_rate"] > 0.5
