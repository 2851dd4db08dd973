"""What ranks talk through, by what they have and what their stage sends."""

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from alignrec.distributed.process_group import process_group
from alignrec.stage import Backend


def test_a_rank_that_computes_on_the_cpu_leaves_the_gpu_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with process_group(backend="gloo", uses_gpu=False) as rank:
        assert rank.device == torch.device("cpu")
    with process_group(backend="gloo") as rank:
        assert rank.device == torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("gpus", "wanted", "expected"),
    [(0, "nccl", "gloo"), (0, "gloo", "gloo"), (8, "nccl", "nccl"), (8, "gloo", "gloo")],
)
def test_nccl_is_for_gpus_and_for_stages_that_send_from_them(
    monkeypatch: pytest.MonkeyPatch, gpus: int, wanted: Backend, expected: str
) -> None:
    devices, backends = list[torch.device](), list[str]()

    def join(backend: str, **_: Any) -> None:
        backends.append(backend)
        raise RuntimeError("no peers here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(dist, "init_process_group", join)
    for name, value in {"RANK": "9", "LOCAL_RANK": "9", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    with contextlib.suppress(Exception), process_group(backend=wanted):
        pass
    assert backends == [expected]
    assert devices == ([torch.device("cuda", 1)] if gpus else [])
