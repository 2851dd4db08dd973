"""The helper that runs ranks, and the process groups on it."""

import os
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alignrec import checkpoint
from alignrec.distributed import process_group
from alignrec.errors import StageFailure
from alignrec.testing.processes import free_port, run_ranks

pytestmark = pytest.mark.multiprocess


def sum_of_ranks() -> tuple[int, int, float]:
    with process_group.process_group(timeout_seconds=30) as rank:
        beside = process_group.new_group(timeout_seconds=30)
        value = process_group.all_reduce_sum(torch.tensor(float(rank.index)), rank)
        dist.all_reduce(value, group=beside)
        process_group.barrier(rank)
    assert not dist.is_initialized()
    return rank.index, rank.world_size, float(value)


def test_ranks_find_each_other() -> None:
    assert run_ranks(sum_of_ranks, 3) == [(0, 3, 9.0), (1, 3, 9.0), (2, 3, 9.0)]


def fail_on(which: int) -> None:
    if int(os.environ["RANK"]) == which:
        raise ValueError(f"planted on rank {which}")
    time.sleep(60)  # a peer that would wait for ever


def test_the_first_failure_ends_all_and_is_shown() -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="planted on rank 1"):
        run_ranks(fail_on, 2, 1)
    assert time.monotonic() - start < 40


def die() -> None:
    if os.environ["RANK"] == "0":
        os.kill(os.getpid(), 9)


def test_a_killed_rank_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"rank 0:\ndied with exit code -9"):
        run_ranks(die, 2)


def test_a_hang_is_named() -> None:
    with pytest.raises(RuntimeError, match=r"ranks \[0, 1\] did not finish within 8 s"):
        run_ranks(fail_on, 2, 7, timeout_seconds=8)


def test_a_missing_peer_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }.items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(StageFailure, match="rank 0 of 2 could not join its peers"),
        process_group.process_group(timeout_seconds=1),
    ):
        pass


def save_both(folder: Path) -> float:
    with process_group.process_group(timeout_seconds=30) as rank:
        tensors = {"row": torch.tensor([float(rank.index)])}
        checkpoint.save(folder, 5, tensors=tensors, state={"rank": rank.index}, rank=rank)
        found = checkpoint.latest(folder)
        assert found is not None
        assert found.world_size == 2
        other, state = found.load(1 - rank.index)
        assert state["rank"] == 1 - rank.index
        return float(other["row"])


def test_every_rank_saves_its_share(tmp_path: Path) -> None:
    assert run_ranks(save_both, 2, tmp_path) == [1.0, 0.0]
