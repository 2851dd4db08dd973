"""The log in Ray tasks: the bytes of one process, also when a worker, a raylet or a driver dies."""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from alignrec.artifacts import WORK
from alignrec.data.schema import SPLITS
from alignrec.errors import StageFailure, UserError
from alignrec.telemetry import Telemetry
from data_prep import engine, interactions, locations
from data_prep.config import (
    DataPrepConfig,
    InteractionColumns,
    InteractionsConfig,
    ItemsConfig,
    SplitConfig,
)
from data_prep.log import estimate_rows
from data_prep.quarantine import Quarantine

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS, NUM_FILES, NUM_BUCKETS = 300, 10, 8
FILES = ("users.parquet", "quarantine.parquet", *(f"interactions/{s}.parquet" for s in SPLITS))
DEADLINE_SECONDS = 120.0


def settings(log: Path, *, num_cpus: int) -> DataPrepConfig:
    return DataPrepConfig(
        items=ItemsConfig(path="unused"),
        interactions=InteractionsConfig(
            path=str(log),
            columns=InteractionColumns(timestamp="time"),
            min_user_interactions=4,
            min_item_interactions=20,
            rows_per_task=1 + estimated_rows(log) // NUM_BUCKETS,
        ),
        split=SplitConfig(strategy="global_time"),
        num_cpus=num_cpus,
        object_store_bytes=100_000_000,
    )


def estimated_rows(log: Path) -> int:
    return estimate_rows(locations.find([str(log)]))


def prepare(log: Path, output: Path, *, num_cpus: int) -> None:
    """Do what the stage does with a log."""
    output.mkdir(exist_ok=True)
    quarantine = Quarantine()
    with Telemetry(output / "logs", "data_prep") as telemetry:
        cleaned = interactions.clean(
            locations.find([str(log)]),
            settings(log, num_cpus=num_cpus),
            pa.array([f"item-{number}" for number in range(NUM_ITEMS)]),
            quarantine=quarantine,
            work=output / WORK,
            telemetry=telemetry,
        )
        interactions.write(cleaned, item_index=np.arange(NUM_ITEMS), folder=output)
    quarantine.write(output / "quarantine.parquet")


def content(output: Path) -> dict[str, bytes]:
    return {name: (output / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    rng = np.random.default_rng(0)
    for number in range(NUM_FILES):
        users = np.minimum(rng.geometric(0.003, 3000), 1500)
        items = rng.geometric(0.02, 3000)  # some beyond the catalogue
        rows = zip(users, items, rng.integers(0, 10**6, 3000), strict=True)
        lines = [f"user-{user},item-{item},{second}\n" for user, item, second in rows]
        path = folder / f"{number}.csv"
        path.write_text("user_id,item_id,time\n" + "".join(lines) + "torn\n")
    return folder


@pytest.fixture(scope="module")
def undisturbed(log: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    prepare(log, output, num_cpus=1)
    assert pq.read_metadata(output / "quarantine.parquet").num_rows > NUM_FILES
    return content(output)


@pytest.fixture
def running(log: Path, tmp_path: Path) -> Iterator[psutil.Popen]:
    """Start a run on two workers."""
    output = tmp_path / "out"
    command = [sys.executable, __file__, str(log), str(output)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("RAY_ADDRESS", None)
    with (tmp_path / "log.txt").open("w") as text:
        process = psutil.Popen(command, env=environment, stdout=text, stderr=text)
        try:
            yield process
        finally:
            for one in [*family(process), process]:
                if one.is_running():
                    one.kill()
            process.wait()


def wait_for(found: Callable[[], Sequence[Any]], process: psutil.Popen) -> None:
    """Wait until something is there, which must be before the run ends."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not found():
        assert process.poll() is None
        assert time.monotonic() < deadline
        try:
            process.wait(0.002)
        except psutil.TimeoutExpired:
            continue


def family(process: psutil.Popen) -> list[psutil.Process]:
    return process.children(recursive=True) if process.is_running() else []


def titled(process: psutil.Popen, title: str) -> list[psutil.Process]:
    """Return the children whose command begins with a word: Ray titles its workers by the task."""
    found = []
    for one in family(process):
        with contextlib.suppress(psutil.Error, IndexError):
            if Path(one.cmdline()[0]).name == title:
                found.append(one)
    return found


def test_a_killed_worker_is_replaced_and_the_bytes_are_those_of_one_process(
    running: psutil.Popen, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    workers: list[psutil.Process] = []
    wait_for(lambda: workers.extend(titled(running, "ray::log pieces")) or workers, running)
    for worker in workers:
        worker.send_signal(signal.SIGKILL)
    assert running.wait(DEADLINE_SECONDS) == 0, (tmp_path / "log.txt").read_text()
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.parametrize("victim", ["driver", "raylet"])
def test_after_a_kill_the_next_run_goes_on_and_ends_with_the_same_bytes(
    victim: str, running: psutil.Popen, log: Path, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    wait_for(lambda: list((tmp_path / "out" / WORK).glob("*/log/0*")), running)
    (killed,) = [running] if victim == "driver" else titled(running, "raylet")
    killed.send_signal(signal.SIGKILL)
    assert running.wait(DEADLINE_SECONDS) != 0
    units = [path for path in (tmp_path / "out" / WORK).glob("*/*/0*") if path.is_dir()]
    assert units
    before = {unit: unit.stat().st_mtime_ns for unit in units}
    prepare(log, tmp_path / "out", num_cpus=1)
    assert content(tmp_path / "out") == undisturbed
    assert {unit: unit.stat().st_mtime_ns for unit in units} == before


def test_what_a_task_raises_says_its_cause() -> None:
    config = DataPrepConfig(source="synthetic", num_cpus=2, object_store_bytes=100_000_000)
    results: list[int] = []

    def half(number: int) -> int:
        if number == 3:
            raise UserError("3 has no half")
        if number == 5:
            raise ZeroDivisionError("5 neither")
        return number // 2

    with engine.session(config):
        engine.run_tasks(half, [0, 2, 4, 6], config=config, what="n", finished=results.append)
        assert sorted(results) == [0, 1, 2, 3]
        with pytest.raises(UserError, match=r"^3 has no half$"):
            engine.run_tasks(half, [2, 3], config=config, what="numbers")
        with pytest.raises(StageFailure, match="task on numbers failed: ZeroDivisionError: 5"):
            engine.run_tasks(half, [2, 5], config=config, what="numbers")


if __name__ == "__main__":
    prepare(Path(sys.argv[1]), Path(sys.argv[2]), num_cpus=2)
