"""Command line: ``python -m cluster up | down | status | render``."""

import argparse
import json
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from alignrec.configuration import load_yaml, variables
from alignrec.errors import UserError
from alignrec.stage import exit_code
from cluster import checkout, kubernetes, state

_DASHBOARD_PORT = 8265
_LEAST_STORE_MB = 80  # Ray's own minimum, a little over 75 MB
_KUBERNETES_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 the work failed, 2 the user's mistake.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], None] = options.command
    return exit_code(lambda: command(options))


def _up(options: argparse.Namespace) -> None:
    from cluster import local_cluster

    _check_range("--hosts", options.hosts, least=1)
    _check_range("--num-cpus", options.num_cpus, least=1)
    _check_range("--object-store-mb", options.object_store_mb, least=_LEAST_STORE_MB)
    for option, port in (("--port", options.port), ("--dashboard-port", options.dashboard_port)):
        _check_range(option, port, least=0, most=65535)
    record = local_cluster.up(
        hosts=options.hosts,
        num_cpus=options.num_cpus,
        object_store_bytes=options.object_store_mb * 1_000_000,
        port=options.port,
        dashboard_port=options.dashboard_port,
    )
    print(f"cluster up: {record.num_hosts} host(s), Ray at {record.address}")
    print(f"dashboard:  {record.dashboard_url} (it asks for the token: ray get-auth-token)")
    print("next:       python -m launch submit demo    or    python -m launch run demo")
    print("stop it:    python -m cluster down")


def _check_range(option: str, value: int | None, *, least: int, most: int | None = None) -> None:
    if value is None or (value >= least and (most is None or value <= most)):
        return
    bounds = f"at least {least}" + (f" and at most {most}" if most is not None else "")
    raise UserError(f"{option} {value} is out of range: no cluster would come up. Use {bounds}.")


def _down(options: argparse.Namespace) -> None:  # noqa: ARG001
    from cluster import local_cluster

    record = local_cluster.down()
    if record is None:
        print("no cluster of this user is up on this machine")
    else:
        print(f"cluster down: {record.address}; Ray's logs stay in {record.session_dir}/logs")


def _status(options: argparse.Namespace) -> None:
    record = state.alive()
    if record is None:
        if options.json:
            print(json.dumps({"up": False}))
            return
        print("no cluster is up on this machine. Start one: python -m cluster up")
        return
    from cluster import local_cluster

    report = local_cluster.describe(record)
    if options.json:
        print(json.dumps(report))
        return
    print(f"Ray at {report['address']}, dashboard {report['dashboard_url']}")
    rows: list[Sequence[object]] = [("node", "alive", "CPU", "GPU", "memory GiB", "metrics")]
    for node in report["nodes"]:
        resources = node["resources"]
        rows.append(
            (
                node["node_id"],
                "yes" if node["alive"] else "no",
                resources.get("CPU", 0),
                resources.get("GPU", 0),
                resources.get("memory", 0),
                node["metrics"],
            )
        )
    print(local_cluster.table(rows))
    print(f"free now: {report['free'].get('CPU', 0)} CPU, {report['free'].get('GPU', 0)} GPU")
    for job in report["jobs"]:
        print(f"job {job['id']}: {job['status'].lower()}")


def _render(options: argparse.Namespace) -> None:
    if options.gpus_per_host and options.cpus_per_host < 1:
        raise UserError("--cpus-per-host must be at least 1: every rank needs a CPU.")
    name = options.name or Path(options.recipe).stem.replace("_", "-").lower()
    if not _KUBERNETES_NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a RayJob: Kubernetes would refuse it. Give a --name of up to 47 "
            f"lower-case letters, digits and dashes that begins with a letter."
        )
    recipe = load_yaml(checkout.recipe_path(options.recipe))
    named = sorted(variables(recipe))
    print(
        kubernetes.render(
            recipe,
            name=name,
            variables={word: os.environ[word] for word in named if word in os.environ},
            recipe=options.recipe,
            image=options.image,
            run_dir=options.run_dir,
            hosts=options.hosts,
            cpus_per_host=options.cpus_per_host,
            gpus_per_host=options.gpus_per_host,
            memory=options.memory,
            volume_claim=options.volume_claim,
        ),
        end="",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m cluster", description="Ray clusters: on this machine, and for Kubernetes."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start a Ray cluster with dashboard on this machine")
    up.add_argument("--hosts", type=int, default=1, help="Ray nodes, all of them on this machine")
    up.add_argument("--num-cpus", type=int, help="CPUs of each node (default: this machine's)")
    up.add_argument("--object-store-mb", type=int, default=300, help="shared memory of each node")
    up.add_argument("--port", type=int, default=0, help="Ray's port (default: any free one)")
    up.add_argument("--dashboard-port", type=int, default=_DASHBOARD_PORT)
    up.set_defaults(command=_up)

    down = commands.add_parser("down", help="stop the cluster that `up` started")
    down.set_defaults(command=_down)

    status = commands.add_parser("status", help="nodes, resources, dashboard, jobs")
    status.add_argument("--json", action="store_true", help="one line for a program")
    status.set_defaults(command=_status)

    render = commands.add_parser("render", help="print a manifest of a recipe's job")
    kinds = render.add_subparsers(required=True, metavar="KIND")
    kube = kinds.add_parser("kubernetes", help="a RayJob of the KubeRay operator")
    kube.add_argument("recipe", help="a recipe's name or path inside the image")
    kube.add_argument("--image", required=True, help="image with the checkout and its packages")
    kube.add_argument("--run-dir", required=True, help="run directory on the shared volume")
    kube.add_argument("--volume-claim", required=True, help="volume claim, mounted at /data")
    kube.add_argument("--name", help="name of the job (default: the recipe's)")
    kube.add_argument("--hosts", type=int, help="workers (default: the most ranks of a stage)")
    kube.add_argument("--cpus-per-host", type=int, default=8)
    kube.add_argument("--gpus-per-host", type=int, default=0)
    kube.add_argument("--memory", default="32Gi", help="memory of each host")
    kube.set_defaults(command=_render)
    return parser


if __name__ == "__main__":
    sys.exit(main())
