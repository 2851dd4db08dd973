"""The Ray that a run works on: the cluster that is up, or one of its own (launch -> stages)."""

import contextlib
import dataclasses
import os
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from alignrec.errors import StageFailure, UserError
from cluster import checkout, environment, state
from cluster.config import ClusterConfig

_OWN_HOST = "127.0.0.1"
_LOOPBACKS = (_OWN_HOST, "localhost", "::1", "[::1]")
_PROBE_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Host:
    """What a node of the cluster has in all, used or not."""

    cpus: float
    gpus: float


@dataclasses.dataclass(frozen=True)
class Share:
    """What each rank of a stage reserves."""

    cpus: int
    gpus: int


@contextlib.contextmanager
def connected(config: ClusterConfig, *, num_ranks: int) -> Iterator[str]:
    """Connect to Ray for the length of the block and yield a line that says which one it is.

    The cluster is, in this order: the one that this process already uses, RAY_ADDRESS (set in
    submitted jobs), the one that ``python -m cluster up`` started, one of its own that ends with
    the block.

    Args:
        config: settings of the recipe.
        num_ranks: ranks of the run's largest stage; a Ray of its own has that many CPUs at least.

    Raises:
        UserError: the cluster that RAY_ADDRESS names does not answer.
    """
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    address = os.environ.get("RAY_ADDRESS")
    record = None if address else state.alive()
    environment.prepare(loopback=not address or _split(address)[0] in _LOOPBACKS)
    import ray

    if ray.is_initialized():
        yield "Ray that is connected already"
        return
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if record is not None:
            address = record.address
            variables = {"PYTHONPATH": _python_path()}
            options["runtime_env"] = {"env_vars": variables}
        elif address and not in_job:
            package = stack.enter_context(checkout.packaged())
            options["runtime_env"] = {"working_dir": str(package)}
        if address is not None:
            _probe(address)
        else:
            os.environ["PYTHONPATH"] = _python_path()
            options |= {
                "num_cpus": max(num_ranks, len(os.sched_getaffinity(0))),
                "include_dashboard": False,
                "object_store_memory": config.object_store_bytes,
                "_node_ip_address": _OWN_HOST,
            }
        try:
            with _own_signals():
                ray.init(address=address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            if address is None:
                raise StageFailure(f"Ray did not start on this machine: {_first(error)}") from error
            raise _no_answer(address, error) from error
        stack.callback(ray.shutdown)
        yield f"Ray cluster at {address}" if address else "a Ray of its own on this machine"


def _probe(address: str) -> None:
    """Find out in seconds that nobody listens: Ray would go on trying for minutes."""
    host, port = _split(address)
    if port is None:
        return  # "auto" and the like
    try:
        socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _no_answer(address, error) from error


def _split(address: str) -> tuple[str, int | None]:
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    return (host, int(port)) if colon and port.isdigit() else (address, None)


def _no_answer(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray cluster answers at {address}: {_first(error)}. Start one (python -m cluster up), "
        f"or correct or unset RAY_ADDRESS."
    )


@contextlib.contextmanager
def _own_signals() -> Iterator[None]:
    """Keep this command's reaction to SIGTERM: Ray's prints a stack and skips the clean end."""
    kept = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, kept)


def hosts() -> list[Host]:
    """Return the hosts of the connected cluster that are alive."""
    import ray

    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [Host(r.get("CPU", 0.0), r.get("GPU", 0.0)) for r in resources]


def share(
    machines: list[Host],
    num_ranks: int,
    config: ClusterConfig,
    *,
    stage: str,
    uses_gpu: bool = True,
) -> Share:
    """Return what each of ``num_ranks`` ranks may reserve so that all of them fit at once.

    Args:
        machines: hosts of the cluster.
        num_ranks: ranks of the stage.
        config: fixed numbers of the recipe go before computed ones.
        stage: name of the stage, for the message.
        uses_gpu: whether a GPU would not lie idle.

    Raises:
        UserError: they do not fit, and would wait for ever.
    """
    gpus = config.gpus_per_rank if uses_gpu else 0
    if gpus is None:
        gpus = 1 if sum(int(m.gpus) for m in machines) >= num_ranks else 0
    most = int(max((m.cpus for m in machines), default=0))
    choices = [config.cpus_per_rank] if config.cpus_per_rank else range(most, 0, -1)
    for cpus in choices:
        if sum(_room(machine, cpus, gpus) for machine in machines) >= num_ranks:
            return Share(cpus, gpus)
    wanted = f"{config.cpus_per_rank or 1} CPU" + (f" and {gpus} GPU" if gpus else "")
    raise UserError(
        f"{stage}.num_ranks={num_ranks} with {wanted} for each does not fit the cluster's "
        f"{len(machines)} host(s) with {sum(m.cpus for m in machines):g} CPUs and "
        f"{sum(m.gpus for m in machines):g} GPUs: it would wait for ever. Lower {stage}.num_ranks, "
        f"cluster.cpus_per_rank or cluster.gpus_per_rank, or add hosts."
    )


def rank_variables(part: Share, environ: Mapping[str, str], *, run: str) -> dict[str, str]:
    """Return the environment variables of a rank.

    Args:
        part: what the rank reserves.
        environ: this process's environment, whose own choices hold.
        run: name of the run, a tag of its metrics.
    """
    variables = {
        "OMP_NUM_THREADS": str(part.cpus),
        # Threads that spin while they wait take the core from the thread that they wait for.
        "OMP_WAIT_POLICY": "PASSIVE",
        "ALIGNREC_RUN": run,
    }
    if not part.gpus:
        variables["DS_ACCELERATOR"] = "cpu"
    variables |= {name: environ[name] for name in variables if environ.get(name)}
    # A rank without a GPU of its own must not see those of others.
    return variables if part.gpus else variables | {"CUDA_VISIBLE_DEVICES": ""}


def _room(machine: Host, cpus: int, gpus: int) -> int:
    by_cpu = int(machine.cpus // cpus)
    return min(by_cpu, int(machine.gpus // gpus)) if gpus else by_cpu


def _python_path() -> str:
    """Return PYTHONPATH with the checkout first: ranks import what this process imports."""
    parts = [str(checkout.ROOT)]
    parts += [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p not in parts]
    return os.pathsep.join(parts)


def _first(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
