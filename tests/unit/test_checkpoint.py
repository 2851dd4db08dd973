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
    assert checkpoint.latest(tmp_path, rank=Rank()) is None
    for step in (1, 2, 30):
        weight = save(tmp_path, step)
    found = checkpoint.latest(tmp_path, rank=Rank())
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
        found = checkpoint.latest(tmp_path, rank=Rank())
    assert found is not None
    assert found.step == 1


@pytest.mark.parametrize("keep", [1, 2])
def test_a_damaged_newest_checkpoint_costs_no_later_one(tmp_path: Path, keep: int) -> None:
    for step in (10, 40):
        save(tmp_path, step)
    (tmp_path / "step_000000000040" / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="step_000000000040 is damaged"):
        assert checkpoint.latest(tmp_path, rank=Rank()).step == 10  # type: ignore[union-attr]
    for step in (20, 30):
        save(tmp_path, step, keep)
        assert checkpoint.latest(tmp_path, rank=Rank()).step == step  # type: ignore[union-attr]
    assert len(list(tmp_path.iterdir())) == keep


def test_tensors_are_read_by_the_beginnings_of_their_names(tmp_path: Path) -> None:
    names = ("user/ids", "user/weight", "item/ids")
    tensors = {name: torch.zeros(1) for name in names}
    checkpoint.save(tmp_path, 1, tensors=tensors, state={}, rank=Rank())
    found = checkpoint.latest(tmp_path, rank=Rank())
    assert found is not None
    assert found.tensors(0).keys() == set(names)
    assert found.tensors(0, "user/").keys() == {"user/ids", "user/weight"}
    assert found.tensors(0, "item/", "user/ids").keys() == {"item/ids", "user/ids"}


def test_an_unfinished_checkpoint_is_not_seen(tmp_path: Path) -> None:
    save(tmp_path, 1)
    for step in (2, 3):
        (tmp_path / f"step_{step:012d}.partial").mkdir()
    found = checkpoint.latest(tmp_path, rank=Rank())
    assert found is not None
    assert found.step == 1
    save(tmp_path, 2)  # left-overs are replaced
    assert len(list(tmp_path.iterdir())) == 2
    assert checkpoint.latest(tmp_path, rank=Rank()).step == 2  # type: ignore[union-attr]
