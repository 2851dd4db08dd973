"""Checkpoints of a running stage: tensors as safetensors, the rest as JSON, atomic and verified.

``<folder>/step_000000120/`` holds ``rank_0000.safetensors`` and ``rank_0000.json`` of each rank and
a ``manifest.json`` with their checksums, written last. No pickle anywhere.
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
from safetensors.torch import load_file, save_file

from alignrec import artifacts
from alignrec.distributed.process_group import Rank, barrier

_PREFIX = "step_"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A whole, verified checkpoint on disk."""

    path: Path
    step: int
    world_size: int

    def load(self, rank_index: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the tensors (on CPU) and the JSON state that this rank saved."""
        stem = self.path / f"rank_{rank_index:04d}"
        tensors = load_file(stem.with_suffix(".safetensors"))
        return tensors, json.loads(stem.with_suffix(".json").read_text())


def save(
    folder: Path,
    step: int,
    *,
    tensors: Mapping[str, torch.Tensor],
    state: Mapping[str, Any],
    rank: Rank,
    keep: int = 2,
) -> None:
    """Save this rank's share of a checkpoint; every rank calls it with the same step.

    Args:
        folder: where the stage keeps its checkpoints.
        step: optimizer step that is complete.
        tensors: this rank's tensors; contiguous, no two sharing storage.
        state: this rank's JSON state (positions, metrics so far, ...).
        rank: this rank.
        keep: number of newest checkpoints that stay.
    """
    final = folder / f"{_PREFIX}{step:012d}"
    partial = final.with_name(final.name + ".partial")
    if rank.is_first:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier(rank)
    stem = partial / f"rank_{rank.index:04d}"
    plain = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    save_file(plain, stem.with_suffix(".safetensors"))
    _sync(stem.with_suffix(".safetensors"))
    artifacts.write_json(stem.with_suffix(".json"), state)
    barrier(rank)
    if rank.is_first:
        content = {
            "step": step,
            "world_size": rank.world_size,
            "files": artifacts.checksums(partial),
        }
        artifacts.write_json(partial / artifacts.MANIFEST, content)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        for old in sorted(_finished(folder))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    barrier(rank)


def latest(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint whose checksums hold; None when there is none.

    A damaged checkpoint is passed over with a warning that names it. Call it before the ranks
    start to write, or on rank 0 alone.
    """
    for path in sorted(_finished(folder), reverse=True):
        try:
            content = json.loads((path / artifacts.MANIFEST).read_text())
            whole = content["files"] == artifacts.checksums(path)
        except (OSError, ValueError, KeyError):
            whole = False
        if whole:
            return Checkpoint(path, content["step"], content["world_size"])
        warnings.warn(
            f"checkpoint {path} is damaged (checksums differ) and is passed over; resuming from "
            f"the one before it",
            stacklevel=2,
        )
    return None


def _finished(folder: Path) -> list[Path]:
    return [p for p in folder.glob(f"{_PREFIX}*") if p.is_dir() and p.suffix != ".partial"]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
