"""Run a function on n ranks of this host, with a timeout and every rank's traceback."""

import multiprocessing as mp
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

_JOIN_SECONDS = 5.0
# Source of a program that runs the align stage by the arguments after the first, and dies in the
# middle of writing its checkpoint number argv[1]: all files are there but the manifest.
DIES_IN_CHECKPOINT = """
import os, signal, sys
from alignrec import artifacts
from alignrec.align import STAGE
from alignrec.stage import main
saves = 0
write = artifacts.write_json
def write_json(path, value):
    global saves
    saves += path.name == artifacts.MANIFEST and path.parent.parent.name == "checkpoints"
    if saves == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, value)
artifacts.write_json = write_json
sys.exit(main(STAGE, sys.argv[2:]))
"""


def free_port() -> int:
    """Return a TCP port that nobody listened on a moment ago."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *arguments: Any,  # noqa: ANN401 - handed on
    timeout_seconds: float = 120.0,
    environment: dict[str, str] | None = None,
) -> list[Any]:
    """Call ``function(*arguments)`` in ``world_size`` processes and return what each returned.

    Each process has RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT as under torchrun and
    one thread. The first failure or the timeout kills all of them.

    Args:
        function: importable function (it is sent by name), e.g. one at the top of a test module.
        world_size: number of ranks.
        *arguments: picklable arguments.
        timeout_seconds: for all ranks together.
        environment: further variables.

    Raises:
        RuntimeError: with the tracebacks of all ranks that failed, or the ranks that hang.
    """
    context = mp.get_context("spawn")
    variables = {
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        **(environment or {}),
    }
    processes, receivers = [], []
    for rank in range(world_size):
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(
            target=_call, args=(function, arguments, rank, variables, sender), daemon=False
        )
        process.start()
        sender.close()
        processes.append(process)
        receivers.append(receiver)
    try:
        return _collect(receivers, processes, timeout_seconds)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(_JOIN_SECONDS)


def _collect(receivers: list[Any], processes: list[Any], timeout_seconds: float) -> list[Any]:
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    failures: dict[int, str] = {}
    open_ends = {receiver: rank for rank, receiver in enumerate(receivers)}
    while open_ends and time.monotonic() < deadline:
        grace = _JOIN_SECONDS if failures else deadline - time.monotonic()
        ready = wait(list(open_ends), timeout=max(grace, 0.0))
        if failures and not ready:
            break
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = open_ends.pop(receiver)
            try:
                good, value = receiver.recv()
            except EOFError:
                processes[rank].join(_JOIN_SECONDS)
                good, value = False, f"died with exit code {processes[rank].exitcode}"
            if good:
                results[rank] = value
            else:
                failures[rank] = str(value)
    if failures:
        text = "\n".join(f"--- rank {rank}:\n{failures[rank]}" for rank in sorted(failures))
        raise RuntimeError(f"{len(failures)} of {len(receivers)} ranks failed\n{text}")
    if open_ends:
        hanging = sorted(open_ends.values())
        raise RuntimeError(f"ranks {hanging} did not finish within {timeout_seconds:.0f} s")
    return [results[rank] for rank in range(len(receivers))]


def _call(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    rank: int,
    variables: dict[str, str],
    sender: Connection,
) -> None:
    os.environ.update(variables, RANK=str(rank), LOCAL_RANK=str(rank))
    import torch

    torch.set_num_threads(1)
    try:
        sender.send((True, function(*arguments)))
    except BaseException:  # the parent raises it again
        sender.send((False, traceback.format_exc()))
    finally:
        sender.close()
