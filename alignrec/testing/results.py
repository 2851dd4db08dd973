"""Seeded features and embeddings artifacts for tests of what comes after training."""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from alignrec import artifacts
from alignrec.telemetry import HISTORY


def write_features(folder: Path, dataset: Path, *, dim: int = 8, seed: int = 0) -> Path:
    """Write a features artifact of random rows for ``dataset`` and return its folder."""
    num_items = artifacts.read(dataset, "dataset").counts["num_items"]
    rows = np.random.default_rng(seed).normal(size=(num_items, dim)).astype(np.float32)
    mark = artifacts.fingerprint("testing", 1, {"seed": seed, "dim": dim}, {})
    with artifacts.writing(
        folder, kind="features", fingerprint=mark, config={}, inputs={"dataset": dataset}
    ) as draft:
        np.save(draft.path / "features.npy", rows)
        np.save(draft.path / "mask.npy", np.ones((num_items, 2), dtype=bool))
        draft.counts |= {"num_items": num_items, "dim": dim}
    return folder


def write_embeddings(folder: Path, dataset: Path, *, dim: int = 8, seed: int = 0) -> Path:
    """Write an embeddings artifact of random rows for ``dataset`` and return its folder."""
    counts = artifacts.read(dataset, "dataset").counts
    generator = torch.Generator().manual_seed(seed)
    tables = {
        name: torch.randn(counts[count], dim, generator=generator)
        for name, count in (("user", "num_users"), ("item", "num_items"))
    }
    history = [
        {"step": step, "time": 0.0, "loss/bpr": 1 / step, "valid/recall@20": step / 100}
        for step in range(1, 6)
    ]
    mark = artifacts.fingerprint("testing", 1, {"seed": seed, "dim": dim}, {})
    with artifacts.writing(
        folder, kind="embeddings", fingerprint=mark, config={}, inputs={"dataset": dataset}
    ) as draft:
        save_file(tables, draft.path / "embeddings.safetensors")
        text = "".join(json.dumps(row) + "\n" for row in history)
        (draft.path / HISTORY).write_text(text, encoding="utf-8")
        draft.counts |= {name: counts[name] for name in ("num_users", "num_items")}
    return folder
