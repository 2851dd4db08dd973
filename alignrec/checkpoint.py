"""Checkpoints of a running stage: tensors as safetensors, the rest as JSON, atomic and verified.

``<folder>/step_000000000120/`` holds ``rank_0000.safetensors`` and ``rank_0000.json`` of each rank
and a ``manifest.json`` with their checksums, written last. A rank hashes its own files when they
are written, and its share of them before a resume. No pickle anywhere.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from alignrec import artifacts
from alignrec.distributed.peers import lost_peers_reported
from alignrec.distributed.process_group import Rank, all_reduce_sum, barrier
from alignrec.distributed.watchdog import Beat, unwatched

_PREFIX, _DIGITS = "step_", 12
_PARTIAL = ".partial"
_CHECKSUMS = ".checksums"  # of one rank's files, until the manifest has them all
_NONE = -1  # the step of no checkpoint


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint on disk."""

    path: Path
    step: int
    world_size: int

    def load(self, rank_index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors (on CPU) and the JSON state that this rank saved."""
        return self.tensors(rank_index), self.state(rank_index)

    def tensors(self, rank_index: int, *prefixes: str) -> dict[str, torch.Tensor]:
        """Return the tensors (on CPU) that this rank saved; others than asked for are not read.

        Args:
            rank_index: rank that saved them.
            *prefixes: beginnings of the names that are wanted; none: all.
        """
        path = _stem(self.path, rank_index).with_suffix(".safetensors")
        with safe_open(path, framework="pt") as file:
            names = [n for n in file.keys() if not prefixes or n.startswith(prefixes)]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in names}

    def state(self, rank_index: int) -> dict[str, Any]:
        """Return the JSON state that this rank saved."""
        text = _stem(self.path, rank_index).with_suffix(".json").read_text()
        state: dict[str, Any] = json.loads(text)
        return state


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    rank: Rank,
    keep: int = 2,
    beat: Beat = unwatched,
) -> None:
    """Save this rank's share of a checkpoint; every rank calls it with the same step.

    Args:
        folder: where the stage keeps its checkpoints.
        step: optimizer step that is complete.
        tensors: this rank's tensors; contiguous, no two sharing storage.
        state: this rank's JSON state (positions, metrics so far, ...).
        rank: this rank.
        keep: number of newest checkpoints that stay.
        beat: called by every rank before it waits for the others.
    """
    final = _path(folder, step)
    partial = final.with_name(final.name + _PARTIAL)
    if rank.is_first:
        for left in folder.glob(f"{_PREFIX}*{_PARTIAL}"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)
    beat()
    barrier(rank)
    _write(_stem(partial, rank.index), tensors, state)
    beat()
    barrier(rank)
    if rank.is_first:
        content = {
            "step": step,
            "world_size": rank.world_size,
            "files": _collect_checksums(partial, rank.world_size),
        }
        artifacts.write_json(partial / artifacts.MANIFEST, content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _prune(folder, final, keep)
    beat()
    barrier(rank)


def latest(folder: Path, *, rank: Rank) -> Checkpoint | None:
    """Return the newest checkpoint whose checksums hold; None when there is none.

    A damaged checkpoint is passed over with a warning that names it. Every rank calls it, before
    they start to write: each reads a share of the files, and all return the same.
    """
    # What one rank sees counts: on shared storage the others may see another moment.
    found = sorted(_finished(folder), reverse=True) if rank.is_first else []
    steps = iter([_step(path) for path in found])
    while (step := _sum(next(steps, _NONE) if rank.is_first else 0, rank)) != _NONE:
        path = _path(folder, step)
        num_faulty = _sum(0 if _is_whole(path, rank) else 1, rank)
        if num_faulty == 0:
            content = json.loads((path / artifacts.MANIFEST).read_text())
            return Checkpoint(path, content["step"], content["world_size"])
        if rank.is_first:
            warnings.warn(
                f"checkpoint {path} is damaged (checksums differ) and is passed over; resuming "
                f"from the one before it",
                stacklevel=2,
            )
    return None


def _write(stem: Path, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> None:
    """Write one rank's files, and their checksums beside them."""
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    paths = stem.with_suffix(".safetensors"), stem.with_suffix(".json")
    save_file(plain, paths[0])
    _sync(paths[0])
    artifacts.write_json(paths[1], state)
    sums = {path.name: artifacts.checksum(path) for path in paths}
    artifacts.write_json(stem.with_suffix(_CHECKSUMS), sums)


def _collect_checksums(partial: Path, world_size: int) -> dict[str, dict[str, Any]]:
    """Return the checksums that the ranks left, and remove what held them."""
    files: dict[str, dict[str, Any]] = {}
    for index in range(world_size):
        path = _stem(partial, index).with_suffix(_CHECKSUMS)
        files |= json.loads(path.read_text())
        path.unlink()
    return files


def _is_whole(path: Path, rank: Rank) -> bool:
    """Tell whether this rank's share of a checkpoint's files, by size, is as it was written."""
    try:
        files = json.loads((path / artifacts.MANIFEST).read_text())["files"]
        names = sorted(files, key=lambda name: (-files[name]["bytes"], name))
        share = names[rank.index :: rank.world_size]
        return all(artifacts.checksum(path / name) == files[name] for name in share)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` up to ``newest``; a later one was passed over."""
    found = sorted(_finished(folder))
    kept = [path for path in found if path <= newest][-keep:]
    for path in found:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def _sum(number: int, rank: Rank) -> int:
    """Return the sum of the ranks' numbers."""
    if rank.world_size == 1:
        return number
    with lost_peers_reported(rank, doing="looking for a checkpoint"):
        return int(all_reduce_sum(torch.tensor(number, device=rank.device), rank))


def _path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:0{_DIGITS}d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix(_PREFIX))


def _stem(path: Path, rank_index: int) -> Path:
    return path / f"rank_{rank_index:04d}"


def _finished(folder: Path) -> list[Path]:
    return [path for path in folder.glob(_PREFIX + _DIGITS * "[0-9]") if path.is_dir()]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
