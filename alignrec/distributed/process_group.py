"""Which rank this is, and the process groups it talks through (torchrun or Ray Train -> stages)."""

import contextlib
import dataclasses
import datetime
import os
from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist

from alignrec.errors import StageFailure
from alignrec.stage import Backend

TIMEOUT_SECONDS = 300.0


@dataclasses.dataclass(frozen=True)
class Rank:
    """This process among its peers.

    Attributes:
        index: 0 .. world_size - 1.
        world_size: number of ranks.
        local_index: index among the ranks on this host; picks the accelerator.
        local_world_size: number of ranks on this host; all of them where no launcher says.
        device: where this rank computes.
    """

    index: int = 0
    world_size: int = 1
    local_index: int = 0
    local_world_size: int = 1
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this rank writes what only one rank may write."""
        return self.index == 0


def rank_from_environment(environment: Mapping[str, str] | None = None) -> Rank:
    """Return the rank that torchrun or Ray Train put into the environment; alone without one."""
    variables = os.environ if environment is None else environment
    local = int(variables.get("LOCAL_RANK", "0"))
    # A launcher may show a rank its own GPU alone, whatever its local index.
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    device = torch.device("cuda", local % gpus) if gpus else torch.device("cpu")
    world_size = int(variables.get("WORLD_SIZE", "1"))
    return Rank(
        index=int(variables.get("RANK", "0")),
        world_size=world_size,
        local_index=local,
        local_world_size=int(variables.get("LOCAL_WORLD_SIZE", world_size)),
        device=device,
    )


@contextlib.contextmanager
def process_group(
    *,
    timeout_seconds: float = TIMEOUT_SECONDS,
    backend: Backend = "nccl",
    uses_gpu: bool = True,
) -> Iterator[Rank]:
    """Join the peers for the length of the block and yield this rank.

    Uses the default process group where the caller (Ray Train) has made one; makes it where the
    environment names several ranks; does nothing for one rank.

    Args:
        timeout_seconds: how long a rank waits for a silent peer.
        backend: of the stage (``Stage.backend``): how ranks with GPUs talk.
        uses_gpu: whether the rank computes on a GPU where there is one (``Stage.uses_gpu``).

    Raises:
        StageFailure: the peers did not all arrive in ``timeout_seconds``.
    """
    rank = rank_from_environment()
    if not uses_gpu:
        rank = dataclasses.replace(rank, device=torch.device("cpu"))
    owner = rank.world_size > 1 and not dist.is_initialized()
    if owner:
        has_gpu = rank.device.type == "cuda"
        if has_gpu:
            torch.cuda.set_device(rank.device)
        try:
            dist.init_process_group(
                backend if has_gpu else "gloo", timeout=datetime.timedelta(seconds=timeout_seconds)
            )
        except (RuntimeError, dist.DistError) as error:
            raise StageFailure(
                f"rank {rank.index} of {rank.world_size} could not join its peers at "
                f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')} within "
                f"{timeout_seconds:.0f} s ({error}). Look for the rank that did not start."
            ) from error
    try:
        yield rank
    finally:
        if owner:
            dist.destroy_process_group()


def new_group(*, timeout_seconds: float = TIMEOUT_SECONDS) -> dist.ProcessGroup | None:
    """Return a second group over all ranks, for a thread that talks beside the main one.

    Every rank must call it in the same order. None when there is one rank.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    group: dist.ProcessGroup = dist.new_group(timeout=datetime.timedelta(seconds=timeout_seconds))
    return group


def barrier(rank: Rank) -> None:
    """Wait for every rank; does nothing for one rank.

    Raises:
        StageFailure: a peer died, or did not arrive before the group's timeout.
    """
    if rank.world_size == 1:
        return
    try:
        dist.barrier()
    except (RuntimeError, dist.DistError) as error:
        raise StageFailure(
            f"rank {rank.index} of {rank.world_size} waited for its peers and lost one "
            f"({str(error).splitlines()[0]}). Look for the rank that died or hangs in the logs of "
            f"the others, or raise timeout_seconds where one only needs longer; then run the same "
            f"command again: it resumes."
        ) from error


def all_reduce_sum(value: torch.Tensor, rank: Rank) -> torch.Tensor:
    """Return the sum of ``value`` over all ranks (in place where there are several)."""
    if rank.world_size > 1:
        dist.all_reduce(value)
    return value
