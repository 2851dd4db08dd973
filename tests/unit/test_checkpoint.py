from pathlib import Path

import pytest
import torch

from alignrec import checkpoint
from alignrec.distributed.process_group import Rank


def save(folder: Path, step: int, keep: int = 2) -> torch.Tensor:
    weight = torch.full((3, 2), float(step)).t()  # not contiguous
    checkpoint.save(
        folder, step, tensors={"weight": weight}, state={"epoch": step}, rank=Rank(), keep=keep
    )
    return weight


def test_the_newest_checkpoint_comes_back_and_old_ones_go(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    for step in (1, 2, 30):
        weight = save(tmp_path, step)
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 30
    tensors, state = found.load(0)
    assert torch.equal(tensors["weight"], weight)
    assert state == {"epoch": 30}
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("damage", ["truncate", "flip", "manifest"])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    newest = tmp_path / "step_000000000002"
    file = newest / ("manifest.json" if damage == "manifest" else "rank_0000.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-5] if damage != "flip" else content[:-1] + b"?")
    with pytest.warns(UserWarning, match="step_000000000002 is damaged"):
        found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "step_000000000002.partial").mkdir()
    found = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)  # the left-over is replaced
    assert checkpoint.latest(tmp_path).step == 2  # type: ignore[union-attr]
