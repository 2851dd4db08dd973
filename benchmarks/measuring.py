"""What a command and all of its descendants cost, and on what machine."""

import contextlib
import dataclasses
import json
import os
import platform
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_MARK = "BENCHMARK_RUN"
_POLL_SECONDS = 0.1
_PACKAGES = ("numpy", "pillow", "pyarrow", "ray", "torch", "torch-geometric")


@dataclasses.dataclass(frozen=True)
class Cost:
    """Cost of one command: wall clock and CPU time, both in seconds."""

    wall_seconds: float
    cpu_seconds: float


class Family:
    """All processes that descend from a command, by a mark in their environment.

    Ray's workers and daemons leave their parents' tree and are waited for by nobody, so neither
    process ids nor resource usage of children finds them.
    """

    def __init__(self) -> None:
        self.mark = uuid.uuid4().hex
        self._known: dict[int, psutil.Process] = {}
        self._strangers: set[int] = set()
        self._seconds: dict[int, float] = {}

    def environment(self) -> dict[str, str]:
        """Return the environment for the command."""
        return os.environ | {_MARK: self.mark}

    def members(self) -> list[psutil.Process]:
        """Return the processes that live now."""
        alive = set(psutil.pids())
        for pid in alive - self._known.keys() - self._strangers:
            try:
                process = psutil.Process(pid)
                if process.environ().get(_MARK) == self.mark:
                    self._known[pid] = process
                elif time.time() - process.create_time() > 2:
                    self._strangers.add(pid)  # a young one may not have its environment yet
            except psutil.Error:
                continue
        return [process for pid, process in self._known.items() if pid in alive]

    def poll(self) -> float:
        """Note the CPU time of all members; return the sum over all that ever were."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                self._seconds[process.pid] = times.user + times.system
        return sum(self._seconds.values())

    def end(self) -> None:
        """Kill what is left."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(self.members(), timeout=20)


def run(command: Sequence[str], *, log: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command to its end and return its cost.

    Raises:
        RuntimeError: it failed; its output is in ``log``.
    """
    family = Family()
    began = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            env=family.environment() | dict(environment or {}),
        )
        ended = threading.Event()
        threading.Thread(target=lambda: (process.wait(), ended.set()), daemon=True).start()
        while not ended.wait(_POLL_SECONDS):
            cpu_seconds = family.poll()
    wall_seconds = time.monotonic() - began
    family.end()
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)[:300]} ended with {process.returncode}:\n{tail}")
    return Cost(wall_seconds, cpu_seconds)


@contextlib.contextmanager
def beside(command: Sequence[str]) -> Iterator[str]:
    """Run a command beside the block; yield the first line that it prints."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def write_result(path: Path, options: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a result file with what is needed to judge and to repeat it."""
    content = {
        "command": f"benchmarks/{Path(sys.argv[0]).name}",
        "options": {key: _told(value) for key, value in options.items()},
        **result,
        "machine": {
            "cores": os.cpu_count(),
            "processor": _processor(),
            "load_average_at_end": os.getloadavg()[0],
            "python": platform.python_version(),
        },
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(json.dumps(content, indent=1))


def _told(option: Any) -> Any:  # noqa: ANN401 - what argparse gives
    """Return an option as a result tells it: no folders of this machine beyond the project."""
    if not isinstance(option, Path):
        return option
    return str(option.relative_to(ROOT)) if option.is_relative_to(ROOT) else option.name


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")
