"""Freed tensors' memory is used again for the length of the block."""

import ctypes
import resource

import pytest
import torch

from alignrec.distributed.host_memory import freed_memory_kept

SIZES = tuple(million * 2**20 for million in (9, 12, 10, 11, 9))  # of fp32: above 32 MiB each


def faults_of_steps() -> int:
    """Return the page faults of some steps, each of which makes tensors and drops them."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        tensors = [torch.ones(size) for size in SIZES]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library has no mallopt"
)
def test_memory_of_a_freed_tensor_is_not_cleared_again_by_the_kernel() -> None:
    outside = faults_of_steps()
    with freed_memory_kept():
        faults_of_steps()  # the first ones are new memory
        inside = faults_of_steps()
    assert outside > 10_000  # 208,896, fewer where pages are larger
    assert inside < outside / 3
    assert faults_of_steps() > 10_000  # as before
