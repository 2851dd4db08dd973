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


def test_rows_take_no_more_memory_than_allowed() -> None:
    """A map over all nodes is part of it: in a large graph a small cache is none."""
    whole = {"num_nodes": NUM_NODES, "num_rows": 100, "dim": DIM, "dtype": torch.float16}
    assert RowCache.within(5 * NUM_NODES + 21, **whole) is None
    for size_bytes, capacity in ((5 * NUM_NODES + 22, 1), (1500, 22), (10_000, 100)):
        cache = RowCache.within(size_bytes, **whole)
        assert cache is not None
        assert bytes_of(cache) <= size_bytes
        ids = torch.arange(NUM_NODES)
        for _ in range(2):
            cache.offer(ids, table())
        assert int(cache.has(ids).sum()) == capacity


def bytes_of(cache: RowCache | SampleCache) -> int:
    return sum(value.nbytes for value in vars(cache).values() if isinstance(value, torch.Tensor))


def test_samples_are_kept_for_an_epoch_while_there_is_room() -> None:
    cache = SampleCache(5, width=2)
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


@pytest.mark.parametrize("stride", [1, 2, 64, 4096, 2**20])
@pytest.mark.parametrize("capacity", [1, 12, 1000, 20_000])
def test_samples_are_right_however_their_keys_lie(capacity: int, stride: int) -> None:
    """Most places are filled, also by keys that are far apart, and with what belongs there."""
    wanted = torch.arange(10_000) * stride
    cache = SampleCache(capacity, width=2)
    cache.start_epoch(0)
    for keys in wanted[torch.randperm(len(wanted), generator=torch.manual_seed(0))].split(999):
        cache.keep(keys, torch.stack([keys % 2**31, keys // 7], 1).to(torch.int32))
    places = cache.find(wanted)
    found = places >= 0
    assert len(places[found].unique()) == int(found.sum()) <= capacity
    # Many more keys than places leave hardly a bucket open, twice as many places hardly a key out.
    assert int(found.sum()) > 0.6 * min(capacity, 0.98 / 0.6 * len(wanted))
    rows = torch.stack([wanted % 2**31, wanted // 7], 1).to(torch.int32)
    assert torch.equal(cache.read(places)[found], rows[found])


def test_samples_take_no_more_memory_than_allowed() -> None:
    """Whatever the size of the graph."""
    assert SampleCache.within(67, num_rows=60, width=15) is None
    assert SampleCache.within(1000, num_rows=0, width=15) is None
    for num_rows in (60, 2**40):
        for size_bytes in (68, 1000, 9000):
            cache = SampleCache.within(size_bytes, num_rows=num_rows, width=15)
            assert cache is not None
            assert bytes_of(cache) <= size_bytes
            cache.start_epoch(0)
            keys = torch.arange(NUM_NODES)
            cache.keep(keys, torch.zeros((NUM_NODES, 15), dtype=torch.int32))
            assert int((cache.find(keys) >= 0).sum()) > 0.5 * size_bytes // 68


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


def test_traffic_is_taken_over_all_ranks() -> None:
    other = torch.tensor([30, 26, 0, 0, 0, 0, 1.5, 1.0], dtype=torch.float64)
    traffic = Traffic()
    traffic.add(nodes=10, remote_nodes=4, wait_seconds=0.5)
    taken = traffic.take(lambda own: own + other)
    assert taken["sampling/remote_node_share"] == 0.75
    assert taken["sampling/wait_seconds"] == 1.0  # the mean
