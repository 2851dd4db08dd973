"""SIGKILL of driver, worker and raylet at random moments: the bytes stay the same."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import yaml

from alignrec import artifacts
from alignrec.data import schema
from alignrec.testing import synthetic

pytestmark = pytest.mark.integration
ROOT = Path(__file__).resolve().parents[2]
NUM_ITEMS = 240
LIMIT_SECONDS = 240.0
_POLL_SECONDS = 0.01
_OF_RAY = re.compile(r"^ray::|/ray/")
_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
Victim = Literal["driver", "worker", "raylet"]


def section(raw: Path) -> dict[str, Any]:
    """Settings with some twenty chunks of items and several buckets of the log."""
    return {
        "items": {"path": str(raw / "items.parquet")},
        "interactions": {
            "path": str(raw / "interactions.parquet"),
            "columns": {"timestamp": "timestamp"},
            "min_user_interactions": 3,
            "min_item_interactions": 3,
            "rows_per_task": 300,
        },
        "images": {"max_side": 64},
        "shards": {"max_samples": 11},
        "max_bad_fraction": 0.05,
        "num_cpus": 2,
        "object_store_bytes": 100_000_000,
    }


class Attempt:
    """One start of the command; every process below it is known."""

    def __init__(self, output: Path, recipe: Path) -> None:
        self._partial = artifacts.partial_path(output)
        self._log = output.with_name("told.txt").open("ab")
        command = [sys.executable, "-m", "data_prep", f"--output={output}", f"--recipe={recipe}"]
        self._first_files = self.num_files()
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=self._log, stderr=self._log)
        self._known: set[int] = set()

    def num_files(self) -> int:
        """Count what lies finished in the draft: the measure of progress."""
        names = (name for _, _, files in os.walk(self._partial) for name in files)
        return sum(not name.startswith(".") and not name.endswith(".writing") for name in names)

    def wait(self, condition: Callable[[], bool] = lambda: False) -> int | None:
        """Wait for the end (its exit code) or for a condition (None).

        Raises:
            TimeoutError: neither came.
        """
        end = time.monotonic() + LIMIT_SECONDS
        while (code := self._process.poll()) is None and not condition():
            self._known |= descendants(self._process.pid).keys()
            if time.monotonic() > end:
                raise TimeoutError(f"still running after {LIMIT_SECONDS:.0f} s")
            try:
                self._process.wait(_POLL_SECONDS)
            except subprocess.TimeoutExpired:
                continue
        return code

    def made(self, num_files: int) -> Callable[[], bool]:
        """Return the condition that this many files are new since the attempt began."""
        return lambda: self.num_files() >= self._first_files + num_files

    def kill(self, victim: Victim, rng: np.random.Generator) -> bool:
        """Send SIGKILL; False where no such process is there (yet, or any more)."""
        below = descendants(self._process.pid)
        found = {
            "driver": [self._process.pid],
            "worker": sorted(pid for pid, name in below.items() if is_worker(name)),
            "raylet": sorted(pid for pid, name in below.items() if "raylet/raylet" in name),
        }[victim]
        if not found:
            return False
        os.kill(int(rng.choice(found)), signal.SIGKILL)
        return True

    def end(self) -> list[str]:
        """Make sure that nothing is left; return the processes that did not end by themselves."""
        self._process.kill()
        self._process.wait()
        self._log.close()
        end = time.monotonic() + 30.0
        while (left := self._left()) and time.monotonic() < end:
            for pid, line in left.items():
                # They look for their raylet now and then, and read its log before they leave.
                if line.startswith(_AGENTS):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(_POLL_SECONDS)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        return list(left.values())

    def _left(self) -> dict[int, str]:
        lines = {pid: command_line(pid) for pid in self._known}
        # A number may have gone to a process of somebody else.
        return {pid: line for pid, line in lines.items() if _OF_RAY.search(line)}


def descendants(pid: int) -> dict[int, str]:
    """Return the command line of every process below ``pid``."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended
            children.setdefault(parent, []).append(int(entry.name))
    result: dict[int, str] = {}
    waiting = [pid]
    while waiting:
        for child in children.get(waiting.pop(), []):
            result[child] = command_line(child)
            waiting.append(child)
    return result


def is_worker(line: str) -> bool:
    """Say whether a command line is a worker's; a raylet goes down with one of its agents."""
    return line.startswith("ray::") and not line.startswith(_AGENTS)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def run_with_kills(
    output: Path, recipe: Path, victims: list[Victim], rng: np.random.Generator
) -> int:
    """Start the command again and again until it ends by itself; return how many kills it met."""
    waiting = list(victims)
    for _ in range(len(victims) + 3):
        attempt = Attempt(output, recipe)
        try:
            code: int | None = None
            fatal = False
            while code is None:
                if not waiting or fatal:
                    code = attempt.wait()
                    continue
                code = attempt.wait(attempt.made(int(rng.integers(1, 25))))
                if code is None and attempt.kill(waiting[0], rng):
                    fatal = waiting.pop(0) != "worker"
                    assert not output.exists()
        finally:
            left = attempt.end()
        assert left == []
        if code == 0:
            break
        # On a machine that is busy with other things Ray may need longer than it gives itself.
        late = "Ray did not start" in output.with_name("told.txt").read_text()
        assert fatal or late, f"exit code {code}, though a lost worker is made up for"
    assert code == 0
    return len(victims) - len(waiting)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    synthetic.write_catalogue(folder, num_items=NUM_ITEMS, num_users=120, image_size=120)
    (folder / "images" / f"{synthetic.item_key(7)}.jpg").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def recipe(raw: Path) -> Path:
    path = raw / "recipe.yaml"
    path.write_text(yaml.safe_dump({"data_prep": section(raw)}))
    return path


@pytest.fixture(scope="module")
def undisturbed(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("quiet") / "dataset"
    assert run_with_kills(output, recipe, [], np.random.default_rng(0)) == 0
    return output


def content(output: Path) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in artifacts.verify(output).files.items()}


def check(output: Path, undisturbed: Path) -> None:
    """Check that a disturbed run lost nothing, has nothing twice and left nothing behind."""
    assert content(output) == content(undisturbed)
    assert artifacts.read(output).counts == artifacts.read(undisturbed).counts
    keys = schema.read_items(output)["item_key"].to_pylist()
    assert keys == [synthetic.item_key(item) for item in range(NUM_ITEMS)]
    used = set(schema.read_samples(output)["shard"].to_pylist())
    assert {f"shards/{path.name}" for path in (output / "shards").iterdir()} == used
    files = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    assert files == {*artifacts.read(output).files, artifacts.MANIFEST}
    assert not artifacts.partial_path(output).exists()


def test_each_kind_of_kill_costs_nothing_but_time(
    recipe: Path, undisturbed: Path, tmp_path: Path
) -> None:
    output = tmp_path / "dataset"
    rng = np.random.default_rng(1)
    assert run_with_kills(output, recipe, ["worker", "driver", "raylet"], rng) == 3
    check(output, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kills_in_any_order(recipe: Path, undisturbed: Path, tmp_path: Path, seed: int) -> None:
    output = tmp_path / "dataset"
    rng = np.random.default_rng([seed, 7])
    kinds: list[Victim] = ["driver", "worker", "raylet"]
    victims = [kinds[place] for place in rng.integers(3, size=5)]
    assert run_with_kills(output, recipe, victims, rng) >= 3  # all, unless it was done before
    check(output, undisturbed)
