"""The record of the cluster that ``up`` started on this machine (up -> run, submit, down)."""

import dataclasses
import json
import os
from pathlib import Path

import psutil

from alignrec import artifacts


@dataclasses.dataclass(frozen=True)
class Process:
    """A process that cannot be confused with a later one of the same number.

    Attributes:
        pid: process number.
        created: unix seconds of its start, as psutil tells.
    """

    pid: int
    created: float

    def find(self) -> psutil.Process | None:
        """Return the process if it still runs."""
        try:
            process = psutil.Process(self.pid)
            same = abs(process.create_time() - self.created) < 0.01
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except psutil.NoSuchProcess:
            return None


@dataclasses.dataclass(frozen=True)
class ClusterState:
    """A Ray cluster that a keeper process holds on this machine.

    Attributes:
        address: host:port that ``ray.init`` connects to.
        dashboard_url: where the dashboard and the job API answer.
        num_hosts: Ray nodes, all of them on this machine.
        keeper: process whose end ends the cluster.
        processes: what the keeper started.
        log: file of the keeper's output.
        session_dir: folder of Ray's own logs.
        started: unix seconds.
    """

    address: str
    dashboard_url: str
    num_hosts: int
    keeper: Process
    processes: tuple[Process, ...]
    log: str
    session_dir: str
    started: float

    @property
    def is_alive(self) -> bool:
        """Whether the keeper still runs."""
        return self.keeper.find() is not None


def home() -> Path:
    """Return the folder of this user's records (ALIGNREC_HOME, else ~/.alignrec)."""
    chosen = os.environ.get("ALIGNREC_HOME")
    return Path(chosen) if chosen else Path.home() / ".alignrec"


def write(state: ClusterState) -> None:
    """Record the cluster."""
    home().mkdir(mode=0o700, parents=True, exist_ok=True)
    artifacts.write_json(_path(), dataclasses.asdict(state))


def read() -> ClusterState | None:
    """Return the recorded cluster, alive or not; None when there is no readable record."""
    try:
        content = json.loads(_path().read_text())
        content["keeper"] = Process(**content["keeper"])
        content["processes"] = tuple(Process(**p) for p in content["processes"])
        return ClusterState(**content)
    except (OSError, ValueError, TypeError, KeyError):
        return None


def alive() -> ClusterState | None:
    """Return the recorded cluster if it still runs."""
    state = read()
    return state if state is not None and state.is_alive else None


def forget() -> None:
    """Remove the record."""
    _path().unlink(missing_ok=True)


def _path() -> Path:
    return home() / "cluster.json"
