"""Rows travel between ranks: any counts, duplicates, gradients, and a rank that dies."""

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from alignrec.distributed.exchange import Exchange, gather_rows, sums_by_row
from alignrec.distributed.process_group import Rank, new_group, process_group
from alignrec.errors import StageFailure
from alignrec.testing.processes import run_ranks

NUM_ROWS, DIM = 23, 3


def table() -> torch.Tensor:
    return torch.arange(NUM_ROWS * DIM, dtype=torch.float32).view(NUM_ROWS, DIM)


def wanted(rank: int) -> torch.Tensor:
    """What a rank asks for: rank 0 nothing, others more and more, with duplicates."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randint(NUM_ROWS, (rank * 20,), generator=generator)


def look_up(rank: Rank, exchange: Exchange, ids: torch.Tensor) -> dict[str, Any]:
    """Rows of rank r are those with id % world_size == r; others are NaN here."""
    world = rank.world_size
    mine = torch.arange(NUM_ROWS) % world == rank.index
    own = torch.where(mine[:, None], table(), torch.nan).requires_grad_()
    rows = gather_rows(exchange, ids, lambda i: i % world, lambda i: own[i])
    (rows.sum() + (rows * (ids[:, None] + rank.index)).sum()).backward()
    route = exchange.send(ids, ids % world)
    lengths = route.received % 4  # the list of id i is i % 4 times i
    ragged = route.reply_ragged(lengths, route.received.repeat_interleave(lengths))
    question = exchange.ask(ids, ids % world)  # in halves, with nothing between them
    asked = question.route()
    answers = asked.begin_reply(asked.received * 2).wait()
    gradients = route.send_back(torch.ones(len(ids), 2))
    blocks = list(sums_by_row(route.received, gradients, at_once=3))
    assert all(len(block) == 3 for block, _ in blocks[:-1])
    local = [int(row) for block, _ in blocks for row in block]
    total = [float(values[0]) for _, block in blocks for values in block]
    return {
        "rows": rows.detach().numpy(),
        "gradient": own.grad.numpy(),
        "halves": (answers.tolist(), asked.by_owner(ids * 2).tolist()),
        "ragged": [part.tolist() for part in ragged],
        "received": (local, total),
        "sum": exchange.sum(torch.tensor([len(ids), 1])).tolist(),
        "maximum": exchange.maximum(torch.tensor([len(ids)])).tolist(),
    }


def on_rank() -> list[dict[str, Any]]:
    with process_group(timeout_seconds=60) as rank:
        groups = [None, new_group(timeout_seconds=60)]
        return [look_up(rank, Exchange(rank, group), wanted(rank.index)) for group in groups]


def check(results: list[dict[str, Any]], asked: list[torch.Tensor]) -> None:
    world = len(results)
    expected = torch.zeros(NUM_ROWS, DIM)
    for rank, ids in enumerate(asked):
        expected.index_add_(0, ids, (1.0 + ids[:, None] + rank).expand(-1, DIM).contiguous())
    times = torch.bincount(torch.cat(asked), minlength=NUM_ROWS)
    for rank, (result, ids) in enumerate(zip(results, asked, strict=True)):
        assert torch.equal(torch.tensor(result["rows"]), table()[ids])
        assert result["halves"][0] == result["halves"][1]
        assert sorted(result["halves"][0]) == sorted((ids * 2).tolist())
        mine = torch.arange(NUM_ROWS) % world == rank
        torch.testing.assert_close(torch.tensor(result["gradient"])[mine], expected[mine])
        assert result["ragged"] == [(ids % 4).tolist(), ids.repeat_interleave(ids % 4).tolist()]
        own = [i for i in range(rank, NUM_ROWS, world) if times[i]]
        assert result["received"] == (own, [float(times[i]) for i in own])
        assert result["sum"] == [sum(map(len, asked)), world]
        assert result["maximum"] == [max(map(len, asked))]


def test_alone_without_a_process_group() -> None:
    ids = torch.tensor([5, 5, 0, 22])
    check([look_up(Rank(), Exchange(Rank()), ids)], [ids])


@pytest.mark.multiprocess
def test_ranks_with_unequal_and_zero_counts() -> None:
    for results in zip(*run_ranks(on_rank, 3), strict=True):
        check(list(results), [wanted(rank) for rank in range(3)])


def lose_a_rank() -> str | None:
    """Rank 1 leaves, which closes its connections as its death would; the others go on."""
    with process_group(timeout_seconds=60) as rank:
        exchange = Exchange(rank, roll_call_seconds=3)
        ids = torch.arange(6)
        exchange.send(ids, ids % 3)
        if rank.index == 1:
            return None
        with pytest.raises(StageFailure) as caught:
            exchange.send(ids, ids % 3)
        return str(caught.value)


@pytest.mark.multiprocess
def test_a_lost_rank_is_named_by_the_others() -> None:
    seen = run_ranks(lose_a_rank, 3)
    for rank in (0, 2):
        assert re.search(
            rf"rank {rank} of 3 failed .*: rank 1 does not answer within 3 s", seen[rank]
        )


def lose_the_store(folder: Path) -> None:
    """Rank 0, which keeps the store here as under most launchers, is killed."""
    with process_group(timeout_seconds=60) as rank:
        exchange = Exchange(rank, roll_call_seconds=3)
        ids = torch.arange(6)
        exchange.send(ids, ids % 3)
        if rank.is_first:
            os.kill(os.getpid(), signal.SIGKILL)
        with pytest.raises(StageFailure) as caught:
            exchange.send(ids, ids % 3)
        (folder / f"{rank.index}").write_text(str(caught.value))


@pytest.mark.multiprocess
def test_the_loss_of_the_rank_with_the_store_is_told_from_that_of_others(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"1 of 3 ranks failed\n--- rank 0:\ndied"):
        run_ranks(lose_the_store, 3, tmp_path)
    for rank in (1, 2):
        told = (tmp_path / f"{rank}").read_text()
        assert re.search(
            rf"rank {rank} of 3 failed .*: rank 0, which keeps .* does not answer", told
        )
