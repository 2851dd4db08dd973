"""Readers of embeddings and content features (align, features -> evaluation, export)."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float32
from numpy.lib.format import open_memmap
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from alignrec import artifacts
from alignrec.errors import UserError

EMBEDDINGS = "embeddings.safetensors"
FEATURES = "features.npy"


def read_embeddings(
    folder: Path, *, num_users: int, num_items: int
) -> tuple[Float32[Tensor, "num_users d"], Float32[Tensor, "num_items d"]]:
    """Return the final (user, item) representations; their score is the inner product.

    Raises:
        UserError: the file is damaged or holds other numbers of users and items.
    """
    path = folder / EMBEDDINGS
    try:
        tables = load_file(path)
        user, item = tables["user"], tables["item"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete {folder} and run its stage again."
        ) from error
    if user.shape[0] != num_users or item.shape[0] != num_items:
        raise UserError(
            f"{path} has {user.shape[0]} users and {item.shape[0]} items, the dataset {num_users} "
            f"and {num_items}: it was trained on another dataset. Train on this one, or name the "
            f"dataset that it was trained on."
        )
    return user.float(), item.float()


def read_features(folder: Path, *, num_items: int) -> Float32[Tensor, "num_items dim"]:
    """Return the content features as float32; row = item_index.

    Raises:
        UserError: the file is damaged, has other items, or values that are not finite.
    """
    path = folder / FEATURES
    try:
        table = open_memmap(path, mode="r")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete {folder} and run its stage again."
        ) from error
    if table.ndim != 2 or table.shape[0] != num_items:
        raise UserError(
            f"{path} has shape {table.shape}, the dataset {num_items} items: the features belong "
            f"to another dataset. Run the features stage on this one."
        )
    features = torch.from_numpy(np.array(table, dtype=np.float32))
    bad = int((~torch.isfinite(features).all(dim=1)).sum())
    if bad:
        raise UserError(
            f"{bad} of {num_items} rows of {path} are not finite, so no similarity to them has a "
            f"meaning. Look at the pretraining loss and run the features stage again."
        )
    return features


def check_same_dataset(folder: Path, dataset: Path) -> None:
    """Refuse an artifact that was made from another dataset than ``dataset``.

    Item numbers could mean other items, and held-out interactions may have been trained on.

    Raises:
        UserError: its manifest names another dataset.
    """
    source = artifacts.read(folder).inputs.get("dataset")
    if source is not None and source["identity"] != artifacts.read(dataset).identity:
        raise UserError(
            f"{folder} was made from the dataset {source['path']} as it was then, not from "
            f"{dataset}: its metrics here would be wrong. Run its stage again on {dataset}."
        )
