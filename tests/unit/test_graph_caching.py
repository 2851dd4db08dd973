"""The cache of other ranks' rows: right rows, bounded, and the popular ones stay."""

import numpy as np
import pytest
import torch

from alignrec.graph.caching import RowCache, Traffic

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


def test_traffic_is_taken_once() -> None:
    traffic = Traffic()
    traffic.add(nodes=10, remote_nodes=4, rows=8, remote_rows=4, cached_rows=1, wait_seconds=0.5)
    assert traffic.take() == {
        "sampling/remote_node_share": 0.4,
        "sampling/remote_row_share": 0.5,
        "sampling/cache_hit_rate": 0.25,
        "sampling/wait_seconds": 0.5,
    }
    assert set(traffic.take().values()) == {0.0}
