"""Ray: a session of its own or the cluster's, and the tasks that run in it (driver only)."""

import contextlib
import dataclasses
import functools
import itertools
import logging
import os
import re
import socket
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from alignrec.errors import StageFailure, UserError
from alignrec.ray_token import ensure_token
from alignrec.telemetry import Telemetry
from data_prep.config import DataPrepConfig
from data_prep.shards import ShardPlan, write_shard

Input = TypeVar("Input")
Plan = TypeVar("Plan")
Result = TypeVar("Result")

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
_ATTEMPTS = 20  # of a task whose worker or host dies
_TASKS_PER_CPU = 2  # sent ahead, so that no CPU waits for the driver

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


def run_tasks(
    function: Callable[[Input], Result],
    inputs: Sequence[Input],
    *,
    config: DataPrepConfig,
    what: str,
    finished: Callable[[Result], None] = lambda _: None,
) -> None:
    """Call a function with each input: as Ray tasks where several can run at once, else right here.

    A task whose worker or host dies is tried again, so calling the function twice must do no harm.

    Args:
        function: importable function, or a partial of one.
        inputs: what the calls differ in.
        config: how Ray is started where none is there, and how many CPUs are used.
        what: plural noun for messages, e.g. "buckets of the log".
        finished: called with each result as soon as it is there, in any order.

    Raises:
        UserError, StageFailure: a call raised it.
        StageFailure: a call failed otherwise, or its worker died again and again.
    """
    if not in_parallel(len(inputs), config):
        for value in inputs:
            finished(function(value))
        return
    with session(config):
        _run_in_ray(function, inputs, config.num_cpus, what, finished)


def in_parallel(num_inputs: int, config: DataPrepConfig) -> bool:
    """Return whether ``run_tasks`` needs Ray for so many inputs."""
    return num_inputs > 1 and config.num_cpus != 1


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Runs units of work that are not done yet, and shows how far it is.

    Attributes:
        config: see ``run_tasks``.
        telemetry: shows the progress.
    """

    config: DataPrepConfig
    telemetry: Telemetry

    def run(
        self,
        function: Callable[[Input, Plan], Any],
        inputs: Sequence[Input],
        plan: Plan,
        *,
        unit: Callable[[Input], Path],
        what: str,
        note: str = "",
    ) -> None:
        """Call ``function(input, plan)`` for every input whose unit is not there.

        Args:
            function: importable function that writes the unit.
            inputs: what the units are made of.
            plan: what they share.
            unit: where each is written; it appears when it is complete.
            what: plural noun for the progress, e.g. "buckets".
            note: shown beside the progress.
        """
        left = [value for value in inputs if not unit(value).is_dir()]
        if not left:
            return
        done = len(inputs) - len(left)
        call = functools.partial(_call_with_plan, function=function, plan=plan)
        with self.telemetry.progress(len(inputs), what, done=done) as bar:

            def count(_: Any) -> None:  # noqa: ANN401 - what the function returns
                bar.update(note=note)

            run_tasks(call, left, config=self.config, what=what, finished=count)

    def total(
        self,
        function: Callable[[Input, Plan], npt.NDArray[np.int64]],
        inputs: Sequence[Input],
        plan: Plan,
        *,
        what: str,
    ) -> npt.NDArray[np.int64]:
        """Return the sum of ``function(input, plan)`` over the inputs, at least one."""
        call = functools.partial(_call_with_plan, function=function, plan=plan)
        sums: list[npt.NDArray[np.int64]] = []

        def add(result: npt.NDArray[np.int64]) -> None:
            sums[:] = [result + sums[0] if sums else result]

        run_tasks(call, inputs, config=self.config, what=what, finished=add)
        return sums[0]


def _call_with_plan(value: Any, *, function: Callable[..., Any], plan: Any) -> Any:  # noqa: ANN401
    return function(value, plan)


def _run_in_ray(
    function: Callable[[Input], Result],
    inputs: Sequence[Input],
    num_cpus: int | None,
    what: str,
    finished: Callable[[Result], None],
) -> None:
    import ray

    # The name is what the dashboard and the workers' titles show.
    remote = ray.remote(num_cpus=1, max_retries=_ATTEMPTS)(_apply).options(name=what)
    shared = ray.put(function)
    num_ahead = num_cpus or _TASKS_PER_CPU * int(ray.cluster_resources().get("CPU", 1))
    left = iter(inputs)
    waiting: list[Any] = []
    try:
        while True:
            num_free = num_ahead - len(waiting)
            waiting += [remote.remote(shared, value) for value in itertools.islice(left, num_free)]
            if not waiting:
                return
            ready, waiting = ray.wait(waiting, num_returns=1)
            finished(ray.get(ready[0]))
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, (UserError, StageFailure)):
            raise error.cause from None
        raise _task_failed(what, error) from error
    except ray.exceptions.RayError as error:
        raise _task_failed(what, error) from error
    finally:
        for task in waiting:
            ray.cancel(task)


def _apply(function: Callable[[Input], Result], value: Input) -> Result:
    return function(value)


def _task_failed(what: str, error: Exception) -> StageFailure:
    return StageFailure(
        f"a task on {what} failed: {_cause(error)}. Finished work is kept: correct the cause and "
        f"run the same command again."
    )


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
    try:
        ray.init(
            address="local",
            num_cpus=config.num_cpus,
            include_dashboard=False,
            object_store_memory=config.object_store_bytes,
            _node_ip_address=_LOOPBACK,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except Exception as error:  # Ray raises a bare one when its processes take above 30 s
        raise StageFailure(
            f"Ray did not start on this machine ({' '.join(str(error).split())[:300]}). It may be "
            f"short of CPU or memory just now. Run the same command again: it resumes."
        ) from error


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
