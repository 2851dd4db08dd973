"""Start, describe and stop a Ray cluster on this machine (command line -> keeper process)."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import psutil

from alignrec.errors import StageFailure, UserError
from cluster import checkout, environment, state

_START_SECONDS = 90.0
_STOP_SECONDS = 20.0


def up(
    *,
    hosts: int,
    num_cpus: int | None,
    object_store_bytes: int,
    port: int,
    dashboard_port: int,
) -> state.ClusterState:
    """Start a cluster that outlives this command.

    Args:
        hosts: Ray nodes, all of them on this machine.
        num_cpus: CPUs of each node; None for the CPUs of this machine.
        object_store_bytes: shared memory of each node.
        port: where Ray itself listens; 0 for any free port.
        dashboard_port: where dashboard and job API listen.

    Raises:
        UserError: one is up already, or the dashboard's port is taken.
        StageFailure: it did not come up.
    """
    running = state.alive()
    if running is not None:
        raise UserError(
            f"a cluster is up already ({running.dashboard_url}, process {running.keeper.pid}). Use "
            f"it, or stop it first: python -m cluster down"
        )
    for number, option in ((port, "--port"), (dashboard_port, "--dashboard-port")):
        if number in listening_ports():
            raise UserError(
                f"{option}={number} is taken by another process, so Ray could not listen there. "
                f"Choose another: {option} {number + 1}"
            )
    log = state.home() / "cluster.log"
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    state.forget()
    command = [sys.executable, "-m", "cluster.keeper", "--log", str(log)]
    command += ["--hosts", str(hosts), "--object-store-bytes", str(object_store_bytes)]
    command += ["--port", str(port), "--dashboard-port", str(dashboard_port)]
    command += ["--num-cpus", str(num_cpus)] if num_cpus else []
    environment.prepare(loopback=True)
    variables = {
        "RAY_TMPDIR": str(_temporary_folder()),
        # Jobs start as `python`, which is to be the one with Ray in it.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
    }
    with log.open("w", encoding="utf-8") as output:
        keeper = subprocess.Popen(  # noqa: S603 - our own module
            command,
            cwd=checkout.ROOT,
            env=os.environ | variables,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return _wait_until_up(keeper, log)


def down() -> state.ClusterState | None:
    """Stop what ``up`` started, and nothing else; None when nothing is up."""
    record = state.read()
    if record is None:
        return None
    keeper = record.keeper.find()
    family = _family(record, keeper)
    if keeper is not None:
        keeper.terminate()
        _wait_until_gone([keeper])
    for process in filter(_lives, family):
        _kill(process)
    left = _wait_until_gone(family)
    if left:
        raise StageFailure(
            f"processes {[p.pid for p in left]} of the cluster do not end. Look at them with ps."
        )
    state.forget()
    return record


def listening_ports() -> set[int]:
    """Return the TCP ports that processes of this machine listen on."""
    return {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}


def describe(record: state.ClusterState) -> dict[str, Any]:
    """Return what ``status`` shows: the record, the nodes with their resources, the jobs."""
    environment.prepare(loopback=True)
    import ray
    from ray.job_submission import JobSubmissionClient

    ray.init(address=record.address, log_to_driver=False, logging_level="ERROR")
    try:
        nodes = [
            {
                "node_id": node["NodeID"][:12],
                "alive": node["Alive"],
                "resources": _plain(node["Resources"]),
                "metrics": f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}",
            }
            for node in ray.nodes()
        ]
        free = _plain(ray.available_resources())
    finally:
        ray.shutdown()
    jobs = [
        {"id": job.submission_id, "status": str(job.status.value)}
        for job in JobSubmissionClient(record.dashboard_url).list_jobs()
        if job.submission_id
    ]
    return {
        "up": True,
        "address": record.address,
        "dashboard_url": record.dashboard_url,
        "pid": record.keeper.pid,
        "log": record.log,
        "session_dir": record.session_dir,
        "nodes": nodes,
        "free": free,
        "jobs": jobs,
    }


def _temporary_folder() -> Path:
    """Return a folder of this user: other programs' ``ray.init()`` does not find the cluster there.

    It stays short, because the sockets' paths in it may have 107 characters.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"alignrec-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder


def _wait_until_up(keeper: subprocess.Popen[bytes], log: Path) -> state.ClusterState:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        record = state.alive()
        if record is not None and record.keeper.pid == keeper.pid:
            return record
        if keeper.poll() is not None:
            raise StageFailure(f"Ray did not start: {_last_line(log)} (all of it: {log})")
        time.sleep(0.1)
    keeper.terminate()
    raise StageFailure(f"Ray did not start within {_START_SECONDS:.0f} s. See {log}")


def _family(record: state.ClusterState, keeper: psutil.Process | None) -> list[psutil.Process]:
    """Return the cluster's processes: those recorded at the start, and what they started since."""
    roots = [p for p in (process.find() for process in record.processes) if p is not None]
    roots += [keeper] if keeper is not None else []
    family = {p.pid: p for p in roots}
    for root in roots:
        try:
            family |= {p.pid: p for p in root.children(recursive=True)}
        except psutil.NoSuchProcess:
            continue
    return list(family.values())


def _wait_until_gone(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait for processes that are not our children; return those that still run."""
    deadline = time.monotonic() + _STOP_SECONDS
    while (left := [p for p in processes if _lives(p)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _lives(process: psutil.Process) -> bool:
    """Tell whether a process still does something; where nobody reaps it, it stays as a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def _kill(process: psutil.Process) -> None:
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")


def _plain(resources: dict[str, float]) -> dict[str, float]:
    """Leave out Ray's resources that name single nodes; bytes in GiB."""
    return {
        name: round(value / 2**30, 2) if "memory" in name else value
        for name, value in sorted(resources.items())
        if ":" not in name
    }


def table(rows: Iterable[Sequence[object]]) -> str:
    """Lay out rows as columns."""
    text = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in text) for i in range(len(text[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in text
    )
