"""A rank that hangs shows its stacks and is named; one that gets on is left alone."""

import time
from pathlib import Path
from threading import Event

import pytest

from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.distributed.watchdog import Watchdog
from alignrec.testing.processes import run_ranks

pytestmark = pytest.mark.multiprocess

SECONDS = 0.5


def test_the_rank_that_hangs_is_named_by_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run_ranks(work, 2, tmp_path / "logs")
    told = capfd.readouterr().err
    for rank in (0, 1):
        assert f"rank {rank} of 2" in told
    assert told.count("behind the others: rank 1;") == 2
    hanging = (tmp_path / "logs" / "stacks_0001.txt").read_text()
    assert hanging.startswith("rank 1 of 2 (host ")
    assert "while testing" in hanging.partition("\n")[0]
    assert "in stuck_here" in hanging
    waiting = (tmp_path / "logs" / "stacks_0000.txt").read_text()
    assert "in barrier" in waiting


def work(folder: Path) -> None:
    with (
        process_group(timeout_seconds=60) as rank,
        Watchdog(rank, folder, seconds=SECONDS, doing="testing") as watchdog,
    ):
        watchdog.beat()  # a batch is read
        if rank.index == 1:
            stuck_here(folder)
        watchdog.beat()
        barrier(rank)
        barrier(rank)


def stuck_here(folder: Path) -> None:
    """Hang until both ranks have written their stacks and compared their beats."""
    deadline = time.monotonic() + 40
    while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < deadline:
        Event().wait(0.05)


def test_who_gets_on_is_left_alone(tmp_path: Path) -> None:
    with Watchdog(Rank(), tmp_path, seconds=0.4, doing="testing") as watchdog:
        for _ in range(10):
            Event().wait(0.1)
            watchdog.beat()
    assert list(tmp_path.iterdir()) == []


def test_without_seconds_nothing_is_watched(tmp_path: Path) -> None:
    with Watchdog(Rank(), tmp_path / "absent", seconds=None, doing="testing") as watchdog:
        watchdog.beat()
    assert not (tmp_path / "absent").exists()


def test_one_standstill_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with Watchdog(Rank(), tmp_path, seconds=0.1, doing="testing"):
        while not (tmp_path / "stacks_0000.json").exists():
            Event().wait(0.02)
        Event().wait(0.5)
    told = capfd.readouterr().err
    assert told.count("has made no progress") == 1
    assert "no rank is behind the others" in told


def test_who_tells_more_often_that_it_is_alive_is_not_ahead(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    ranks = [Watchdog(Rank(index, 2), tmp_path, seconds=0.3, doing="testing") for index in range(2)]
    with ranks[0], ranks[1]:
        for _ in range(5):
            Event().wait(0.1)
            for rank in ranks:
                rank.alive()
            ranks[0].alive()
        assert list(tmp_path.iterdir()) == []
        Event().wait(3.5)  # both stand still, and the grace has passed
    told = capfd.readouterr().err
    assert told.count("no rank is behind the others") == 2
