"""A smaller, earlier state of a dataset: what a catalogue had before it grew, for tests."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from alignrec import artifacts
from alignrec.data import schema


def write_part(
    folder: Path,
    dataset: Path,
    *,
    num_items: int,
    num_users: int,
    without: Iterable[int] = (),
) -> Path:
    """Write the dataset of the first items and users of another one, without its samples.

    Args:
        folder: the new artifact.
        dataset: where the rows come from.
        num_items: items 0 .. num_items - 1 stay.
        num_users: users 0 .. num_users - 1 stay.
        without: item_index of items whose interactions are left out.
    """
    hidden = sorted(without)
    settings = {"num_items": num_items, "num_users": num_users, "without": hidden}
    mark = artifacts.fingerprint("testing", 1, settings, {})
    with artifacts.writing(
        folder, kind="dataset", fingerprint=mark, config=settings, inputs={}
    ) as draft:
        for table, count in (("items", num_items), ("users", num_users)):
            rows = pq.read_table(dataset / f"{table}.parquet").slice(0, count)
            pq.write_table(rows, draft.path / f"{table}.parquet")
        (draft.path / "interactions").mkdir(exist_ok=True)
        for split in schema.SPLITS:
            rows = pq.read_table(schema.interactions_path(dataset, split))
            item = rows["item_index"].to_numpy()
            kept = (item < num_items) & (rows["user_index"].to_numpy() < num_users)
            rows = rows.filter(kept & ~np.isin(item, hidden))
            pq.write_table(rows, schema.interactions_path(draft.path, split))
            draft.counts[f"num_{split}"] = len(rows)
        draft.counts |= {"num_items": num_items, "num_users": num_users}
    return folder


def write_features_part(folder: Path, features: Path, *, dataset: Path) -> Path:
    """Write the features of a smaller dataset's items, as a larger one's have them.

    Args:
        folder: the new artifact.
        features: artifact of the larger dataset.
        dataset: the smaller one.
    """
    num_items = artifacts.read(dataset, "dataset").counts["num_items"]
    whole = artifacts.read(features, "features")
    mark = artifacts.fingerprint("testing", 1, {"num_items": num_items}, {"all": whole.identity})
    with artifacts.writing(
        folder, kind="features", fingerprint=mark, config={}, inputs={"dataset": dataset}
    ) as draft:
        for name in ("features.npy", "mask.npy"):
            np.save(draft.path / name, np.load(features / name, mmap_mode="r")[:num_items])
        draft.counts |= {"num_items": num_items, "dim": whole.counts["dim"]}
    return folder
