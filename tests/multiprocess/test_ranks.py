"""The helper that runs ranks, and the process groups on it."""

import os
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from alignrec import artifacts, checkpoint
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


def test_who_waits_for_one_that_only_needs_longer_is_told_what_to_raise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost() -> None:
        raise RuntimeError("Timed out waiting 1000ms for recv operation to complete")

    monkeypatch.setattr(dist, "barrier", lost)
    with pytest.raises(StageFailure, match=r"lost one \(Timed out.*raise timeout_seconds"):
        process_group.barrier(process_group.Rank(index=1, world_size=2))


def save_both(folder: Path) -> tuple[float, list[str], list[str], int]:
    """Return what the other rank saved, what this one hashed, and the step after a damage."""
    hashed, checksum = list[str](), artifacts.checksum

    def noting(path: Path) -> dict[str, object]:
        hashed.append(path.name)
        return checksum(path)

    artifacts.checksum = noting
    with process_group.process_group(timeout_seconds=30) as rank:
        for step in (4, 5):
            tensors = {"row": torch.tensor([float(rank.index)])}
            checkpoint.save(folder, step, tensors=tensors, state={"rank": rank.index}, rank=rank)
        written = sorted(set(hashed))
        hashed.clear()
        found = checkpoint.latest(folder, rank=rank)
        assert found is not None
        assert (found.step, found.world_size) == (5, 2)
        tensors, state = found.load(1 - rank.index)
        other = float(tensors["row"])
        assert state["rank"] == 1 - rank.index
        verified = sorted(hashed)
        process_group.barrier(rank)
        if rank.is_first:
            (found.path / "rank_0001.safetensors").write_bytes(b"?")
        process_group.barrier(rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # rank 0 tells
            left = checkpoint.latest(folder, rank=rank)
        assert left is not None
        return other, written, verified, left.step


def test_every_rank_saves_and_hashes_its_share_of_a_checkpoint(tmp_path: Path) -> None:
    (row0, written0, verified0, left0), (row1, written1, verified1, left1) = run_ranks(
        save_both, 2, tmp_path
    )
    assert (row0, row1) == (1.0, 0.0)
    assert written0 == ["rank_0000.json", "rank_0000.safetensors"]
    assert written1 == ["rank_0001.json", "rank_0001.safetensors"]
    assert sorted(verified0 + verified1) == sorted(written0 + written1)
    for verified in (verified0, verified1):
        assert sum(name.endswith(".safetensors") for name in verified) == 1
    assert (left0, left1) == (4, 4)  # one rank alone sees the damage
