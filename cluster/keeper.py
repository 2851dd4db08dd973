"""The process that holds a Ray cluster on this machine until it is told to end (up -> Ray).

Ray's processes watch it: when it goes, by a signal or a crash, they go.
"""

import argparse
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

import psutil

from cluster import environment, state

HOST = "127.0.0.1"


def main() -> int:
    """Start the nodes, record them, wait for SIGTERM, stop them."""
    options = _parser().parse_args()
    environment.prepare(loopback=True)
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args=_head_arguments(options))
    try:
        for _ in range(options.hosts - 1):
            cluster.add_node(node_ip_address=HOST, **_node_arguments(options))
        cluster.wait_for_nodes()
        stop = _StopRequest()  # after the nodes: their own handler would drain them for 20 s
        state.write(_describe(cluster, options))
        stop.wait()
    finally:
        state.forget()
        for node in cluster.list_all_nodes():
            cluster.remove_node(node, allow_graceful=False)  # jobs are over or to be stopped
    return 0


class _StopRequest:
    """Remembers that SIGTERM or SIGINT came, also before anybody waited."""

    def __init__(self) -> None:
        self._come = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def wait(self) -> None:
        while not self._come:
            time.sleep(0.1)

    def _handle(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._come = True


def _head_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return _node_arguments(options) | {
        "node_ip_address": HOST,
        "gcs_server_port": options.port or None,
        "include_dashboard": True,
        "dashboard_host": HOST,
        "dashboard_port": options.dashboard_port,
    }


def _node_arguments(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "num_cpus": options.num_cpus,
        "object_store_memory": options.object_store_bytes,
        "dashboard_agent_listen_port": 0,
    }


def _describe(cluster: Any, options: argparse.Namespace) -> state.ClusterState:  # noqa: ANN401
    me = psutil.Process()
    return state.ClusterState(
        address=cluster.address,
        dashboard_url=f"http://{cluster.webui_url}",
        num_hosts=options.hosts,
        keeper=state.Process(me.pid, me.create_time()),
        processes=tuple(
            state.Process(child.pid, child.create_time()) for child in me.children(recursive=True)
        ),
        log=str(options.log),
        session_dir=cluster.head_node.get_session_dir_path(),
        started=time.time(),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"{Path(sys.executable).name} -m cluster.keeper")
    parser.add_argument("--hosts", type=int, default=1)
    parser.add_argument("--num-cpus", type=int, default=os.cpu_count())
    parser.add_argument("--object-store-bytes", type=int, default=300_000_000)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--dashboard-port", type=int, default=8265)
    parser.add_argument("--log", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
