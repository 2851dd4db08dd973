"""What a rank says when another one is gone (every distributed stage -> command line)."""

import contextlib
from collections.abc import Iterator

import torch.distributed as dist

from alignrec.distributed.process_group import Rank
from alignrec.errors import StageFailure

# How gloo words the loss of a peer; NCCL and the store raise dist.DistError.
_SIGNS = ("closed by peer", "Timed out", "timed out", "Connection reset", "Broken pipe", "gloo")


@contextlib.contextmanager
def lost_peers_reported(rank: Rank, *, doing: str) -> Iterator[None]:
    """Turn the failure of a collective into one line that names this rank.

    Args:
        rank: this rank.
        doing: what it was doing, e.g. "training".

    Raises:
        StageFailure: a peer died or was silent for longer than the process group's timeout.
    """
    try:
        yield
    except StageFailure:
        raise
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or any(sign in str(error) for sign in _SIGNS)
        if rank.world_size == 1 or not lost:
            raise
        reason = str(error).strip().splitlines()[0]
        raise StageFailure(
            f"rank {rank.index} of {rank.world_size} lost a peer while {doing} ({reason}). Look "
            f"for the rank that ended or hangs; run the same command again to resume."
        ) from error
