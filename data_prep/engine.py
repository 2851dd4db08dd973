"""Ray: a session of its own or the cluster's, and shard tasks as a Ray Data job (driver only)."""

import contextlib
import functools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

from alignrec.errors import StageFailure, UserError
from alignrec.ray_token import ensure_token
from data_prep.config import DataPrepConfig
from data_prep.shards import ShardPlan, write_shard

# Ray warns of what is meant (no bars, token authentication is on), and prints a failed task's
# stack beside the exception that says the same.
_LOG_LEVELS = {
    "ray.data._internal.progress": logging.ERROR,
    "ray.data._internal.execution.streaming_executor_state": logging.CRITICAL,
    "ray.data.exceptions": logging.CRITICAL,
    "ray._private.authentication.authentication_token_setup": logging.ERROR,
}

_ENVIRONMENT = {
    "RAY_DATA_LOG_LEVEL": "WARNING",  # or it tells of every plan
    "RAY_USAGE_STATS_ENABLED": "0",  # reports to nobody
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # does not warn about machines without accelerators
}

_ENVIRONMENT_OF_OWN = {
    # Without it Ray replaces 127.0.0.1 by the machine's address and listens on all interfaces.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
_LOOPBACK = "127.0.0.1"
_LOOPBACKS = (_LOOPBACK, "localhost")
_PROBE_SECONDS = 5.0

# A line such as "OSError: [Errno 28] No space left on device"; Ray's own have a dotted name.
_EXCEPTION = re.compile(r"[A-Z]\w*(Error|Exception|Interrupt|Exit): ")


@contextlib.contextmanager
def session(config: DataPrepConfig) -> Iterator[None]:
    """Use the Ray that is there, or start one on this machine for the time of the block.

    Raises:
        UserError: RAY_ADDRESS names a cluster that does not answer.
    """
    address = os.environ.get("RAY_ADDRESS")
    for variable, value in (_ENVIRONMENT | ({} if address else _ENVIRONMENT_OF_OWN)).items():
        os.environ.setdefault(variable, value)
    if not address:
        ensure_token()
    for name, level in _LOG_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    import ray  # it reads the variables above when it is imported

    if ray.is_initialized():
        yield
        return
    _connect(address, config)
    try:
        yield
    finally:
        ray.shutdown()


def run_shards(
    plan: ShardPlan,
    chunks: list[int],
    *,
    num_cpus: int | None,
    finished: Callable[[dict[str, Any]], None],
) -> None:
    """Make the shards of ``chunks`` in parallel.

    Args:
        plan: what the tasks share.
        chunks: numbers of the chunks that are not done yet.
        num_cpus: most tasks at once; None: as many as the cluster has CPUs.
        finished: called with the summary of each shard as soon as it is done, in any order.

    Raises:
        StageFailure: a task failed for another reason than bad data.
    """
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    rows = [{"chunk": chunk} for chunk in chunks]
    # One block a chunk, so that each is a task of its own: that is what a lost worker costs.
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        functools.partial(write_shard, plan=plan),
        num_cpus=1,
        compute=ray.data.TaskPoolStrategy(size=num_cpus),
    )
    try:
        for summary in dataset.iter_rows():
            finished(summary)
    except ray.exceptions.RayError as error:
        raise StageFailure(
            f"a shard task failed: {_cause(error)}. Finished shards are kept: correct the cause "
            f"and run the same command again."
        ) from error


def _cause(error: Exception) -> str:
    """Return the exception that a task met; Ray Data hands it on as the text of a traceback."""
    lines = str(error).strip().splitlines()
    causes = (line for line in lines if _EXCEPTION.match(line))
    return next(causes, lines[0] if lines else type(error).__name__)


def _connect(address: str | None, config: DataPrepConfig) -> None:
    import ray

    if address:
        _probe(address)
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise _no_answer(address, error) from error
        return
    ray.init(
        address="local",
        num_cpus=config.num_cpus,
        include_dashboard=False,
        object_store_memory=config.object_store_bytes,
        _node_ip_address=_LOOPBACK,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )


def _probe(address: str) -> None:
    """Find out within seconds that nobody listens: Ray itself goes on trying for minutes.

    Raises:
        UserError: nobody listens.
    """
    host, colon, port = address.rpartition("://")[2].rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto" and the like
    import ray

    # Ray takes a loopback address for this machine's own address.
    hosts = [host, ray.util.get_node_ip_address()] if host in _LOOPBACKS else [host]
    for index, name in enumerate(hosts, start=1):
        try:
            with socket.create_connection((name, int(port)), timeout=_PROBE_SECONDS):
                return
        except (OSError, OverflowError) as error:
            if index == len(hosts):
                raise _no_answer(address, error) from error


def _no_answer(address: str, error: Exception) -> UserError:
    return UserError(
        f"no Ray answers at RAY_ADDRESS={address}: {' '.join(str(error).split())[:200]}. Start "
        f"one (python -m cluster up), or correct or unset RAY_ADDRESS."
    )
