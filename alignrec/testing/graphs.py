"""Small features and graph artifacts for tests of the graph and align stages."""

from pathlib import Path
from typing import Any

import numpy as np

from alignrec import artifacts
from alignrec.graph import STAGE
from alignrec.stage import Context


def write_features(
    folder: Path, *, num_items: int, dim: int = 12, seed: int = 0, zero_rows: tuple[int, ...] = ()
) -> Path:
    """Write a finished features artifact of random rows in four loose clusters.

    Args:
        folder: the artifact; an older one there is replaced.
        num_items: rows.
        dim: features of an item.
        seed: equal arguments give equal bytes.
        zero_rows: items without image and text.
    """
    settings = {"num_items": num_items, "dim": dim, "seed": seed, "zero_rows": list(zero_rows)}
    mark = artifacts.fingerprint("testing", 1, settings, {})
    with artifacts.writing(
        folder, kind="features", fingerprint=mark, config=settings, inputs={}
    ) as draft:
        rng = np.random.default_rng([seed, 3])
        centres = rng.normal(size=(4, dim))
        rows = centres[rng.integers(4, size=num_items)] + rng.normal(size=(num_items, dim))
        rows[list(zero_rows)] = 0
        mask = np.ones((num_items, 2), dtype=np.bool_)
        mask[list(zero_rows)] = False
        np.save(draft.path / "features.npy", rows.astype(np.float32))
        np.save(draft.path / "mask.npy", mask)
        draft.counts.update(num_items=num_items, dim=dim)
    return folder


def write_graph(folder: Path, *, dataset: Path, features: Path, **settings: Any) -> Path:  # noqa: ANN401
    """Run the graph stage in this process, alone, and return the finished artifact.

    Args:
        folder: the artifact.
        dataset: e.g. from ``alignrec.testing.datasets.write_dataset``.
        features: e.g. from ``write_features``.
        **settings: of the graph stage.
    """
    config = STAGE.load_config(settings)
    inputs = {"dataset": dataset, "features": features}
    context = Context(
        inputs=inputs,
        output=folder,
        fingerprint=STAGE.fingerprint(config, inputs, folder),
        log_dir=folder.with_name(folder.name + ".logs"),
    )
    STAGE.load_run()(config, context)
    return folder
