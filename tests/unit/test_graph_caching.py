"""The cache of other ranks' rows: right rows, bounded, and the popular ones stay."""

import numpy as np
import pytest
import torch

from alignrec.graph.caching import RowCache, SampleCache, Traffic

NUM_NODES, DIM = 200, 3


def table() -> torch.Tensor:
    return torch.arange(NUM_NODES * DIM, dtype=torch.float16).reshape(NUM_NODES, DIM)


def ask(cache: RowCache, ids: torch.Tensor) -> int:
    """Read what is there, offer the rest, as a loader does; return the number of hits."""
    found = cache.has(ids)
    torch.testing.assert_close(cache.read(ids[found]), table()[ids[found]])
    cache.offer(ids[~found], table()[ids[~found]])
    return int(found.sum())


@pytest.mark.parametrize("capacity", [1, 7, 50, 400])
def test_rows_are_right_and_bounded(capacity: int) -> None:
    cache = RowCache(NUM_NODES, capacity, dim=DIM, dtype=torch.float16)
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(60):
        hits += ask(cache, torch.from_numpy(rng.choice(NUM_NODES, size=40, replace=False)))
        assert int(cache.has(torch.arange(NUM_NODES)).sum()) <= capacity
    assert hits > 0


def test_rows_are_kept_from_the_second_time() -> None:
    cache = RowCache(NUM_NODES, 10, dim=DIM, dtype=torch.float16)
    ids = torch.arange(5)
    assert [ask(cache, ids) for _ in range(4)] == [0, 0, 5, 5]


def test_popular_rows_stay_when_others_come_once() -> None:
    cache = RowCache(NUM_NODES, 10, dim=DIM, dtype=torch.float16)
    popular = torch.arange(8)
    for _ in range(3):
        ask(cache, popular)
    for first in range(20, 190, 10):
        ask(cache, torch.arange(first, first + 10))
        assert ask(cache, popular) == 8


def test_samples_are_kept_for_an_epoch_while_there_is_room() -> None:
    cache = SampleCache(NUM_NODES, 5, width=2)
    rows = torch.arange(2 * NUM_NODES, dtype=torch.int32).view(-1, 2)
    cache.start_epoch(0)
    for keys in (torch.tensor([7, 3, 9]), torch.tensor([1, 190, 50])):
        assert (cache.find(keys) < 0).all()
        cache.keep(keys, rows[keys])
    places = cache.find(torch.arange(NUM_NODES))
    kept = (places >= 0).nonzero()[:, 0]
    assert kept.tolist() == [1, 3, 7, 9, 190]  # 50 came when it was full
    assert torch.equal(cache.read(places)[kept], rows[kept])
    cache.start_epoch(0)
    assert torch.equal(cache.find(torch.arange(NUM_NODES)), places)
    cache.start_epoch(1)
    assert (cache.find(torch.arange(NUM_NODES)) < 0).all()


@pytest.mark.parametrize(("size_bytes", "capacity"), [(1000, 3), (40_000, 60), (803, None)])
def test_samples_take_no_more_memory_than_allowed(size_bytes: int, capacity: int | None) -> None:
    cache = SampleCache.within(size_bytes, num_keys=NUM_NODES, num_rows=60, width=15)
    assert (cache is None) == (capacity is None)
    if cache is not None:
        keys = torch.arange(NUM_NODES)
        cache.start_epoch(0)
        cache.keep(keys, torch.zeros((NUM_NODES, 15), dtype=torch.int32))
        assert int((cache.find(keys) >= 0).sum()) == capacity


def test_traffic_is_taken_once() -> None:
    traffic = Traffic()
    traffic.add(
        nodes=10,
        remote_nodes=4,
        cached_nodes=3,
        rows=8,
        remote_rows=4,
        cached_rows=1,
        wait_seconds=0.5,
    )
    assert traffic.take() == {
        "sampling/remote_node_share": 0.4,
        "sampling/sample_hit_rate": 0.75,
        "sampling/remote_row_share": 0.5,
        "sampling/cache_hit_rate": 0.25,
        "sampling/wait_seconds": 0.5,
    }
    assert set(traffic.take().values()) == {0.0}
