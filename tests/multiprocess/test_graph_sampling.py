"""Batches on several ranks: full fanout is the whole graph, and ranks do not change the sample."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch

from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import new_group, process_group
from alignrec.graph.loader import TripleLoader, TripleSettings, prefetch
from alignrec.graph.schema import ITEM, USER
from alignrec.graph.stores import PartitionedGraph
from alignrec.testing.datasets import write_dataset
from alignrec.testing.graphs import write_features, write_graph
from alignrec.testing.processes import run_ranks
from alignrec.testing.propagation import batch_propagation, dense_propagation, random_parameters

NUM_USERS, NUM_ITEMS, NUM_FEATURES = 50, 40, 12
STEPS_OF_FIVE = 60


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


def settings(fanout: int, layers: int = 2, batch: int = 30) -> TripleSettings:
    return TripleSettings((fanout,) * layers, (fanout,), batch, num_negatives=2, seed=3)


def collect_rows(graph: Path, fanout: int, layers: int) -> dict[str, Any]:
    """Return seeds and their representations over an epoch of this rank."""
    parameters = random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES)
    rows: dict[str, list[Any]] = {"user": [], "item": [], "triples": [], "totals": []}
    with process_group(timeout_seconds=60) as rank:
        exchange = Exchange(rank, new_group(timeout_seconds=60))
        store = PartitionedGraph.open(graph, rank)
        loader = TripleLoader(store, exchange, settings(fanout, layers))
        with contextlib.closing(prefetch(loader.epoch(1), depth=2)) as batches:
            for batch in batches:
                h = batch_propagation(batch, parameters)
                user = batch[USER].src_index
                positive, negative = batch[ITEM].dst_pos_index, batch[ITEM].dst_neg_index
                item = torch.cat([positive, negative.ravel()])
                rows["user"] += [
                    (int(u), a.tolist(), b.tolist())
                    for u, a, b in zip(
                        batch[USER].n_id[user], h.user_id[user], h.user_mm[user], strict=True
                    )
                ]
                rows["item"] += [
                    (int(i), a.tolist(), b.tolist())
                    for i, a, b in zip(
                        batch[ITEM].n_id[item], h.item_id[item], h.item_mm[item], strict=True
                    )
                ]
                rows["triples"] += [
                    (batch.step, int(u), int(p), tuple(n))
                    for u, p, n in zip(
                        batch[USER].n_id[user],
                        batch[ITEM].n_id[positive],
                        batch[ITEM].n_id[negative].tolist(),
                        strict=True,
                    )
                ]
                rows["totals"].append((batch.step, len(user), batch.num_triples))
    return rows


def run_epoch(graph: Path, world_size: int, fanout: int, layers: int = 2) -> list[dict[str, Any]]:
    if world_size == 1:
        return [collect_rows(graph, fanout, layers)]
    return run_ranks(collect_rows, world_size, graph, fanout, layers)


@pytest.mark.multiprocess
@pytest.mark.parametrize(("world_size", "layers"), [(1, 2), (1, 3), (2, 2), (3, 3)])
def test_full_fanout_is_the_whole_graph(
    inputs: dict[str, Path], world_size: int, layers: int
) -> None:
    """Every seed's representations equal dense propagation; with 2 partitions rank 3 owns none."""
    graph = inputs["graph2" if world_size == 3 else "graph4"]
    expected = dense_propagation(
        random_parameters(NUM_USERS, NUM_ITEMS, NUM_FEATURES),
        dataset=inputs["dataset"],
        features=inputs["features"],
        graph=graph,
        num_layers=layers,
    )
    ranks = run_epoch(graph, world_size, -1, layers)
    for kind, by_id, by_content in (
        ("user", expected.user_id, expected.user_mm),
        ("item", expected.item_id, expected.item_mm),
    ):
        seen = [row for rank in ranks for row in rank[kind]]
        ids = torch.tensor([row[0] for row in seen])
        assert len(ids) >= 300
        torch.testing.assert_close(
            torch.tensor([row[1] for row in seen], dtype=torch.float64),
            by_id[ids],
            atol=1e-6,
            rtol=0,
        )
        torch.testing.assert_close(
            torch.tensor([row[2] for row in seen], dtype=torch.float64),
            by_content[ids],
            atol=1e-6,
            rtol=0,
        )


@pytest.mark.multiprocess
def test_ranks_and_partitions_do_not_change_triples_or_samples(inputs: dict[str, Path]) -> None:
    """1, 2 and 4 partitions on 1, 2 and 4 ranks: the same triples a step, the same values."""
    reference = run_epoch(inputs["graph1"], 1, 2)
    triples = sorted(reference[0]["triples"])
    assert len(triples) == len({t[1:3] for t in triples}) == NUM_USERS * 6
    values = {
        (r[0], tuple(r[1]), tuple(r[2])) for kind in ("user", "item") for r in reference[0][kind]
    }
    for parts, world_size in ((4, 1), (2, 2), (4, 4)):
        ranks = run_epoch(inputs[f"graph{parts}"], world_size, 2)
        assert sorted(t for rank in ranks for t in rank["triples"]) == triples
        others = [r for rank in ranks for kind in ("user", "item") for r in rank[kind]]
        close = {(r[0], *(round(x, 5) for x in r[1] + r[2])) for r in others}
        assert close == {(v[0], *(round(x, 5) for x in v[1] + v[2])) for v in values}
        steps = len(ranks[0]["totals"])
        assert [len(rank["totals"]) for rank in ranks] == [steps] * world_size
        for totals in zip(*(rank["totals"] for rank in ranks), strict=True):
            assert {total[2] for total in totals} == {sum(total[1] for total in totals)}
