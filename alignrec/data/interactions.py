"""A split's items of each user, read in parts (dataset -> evaluation, export)."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.errors import UserError

_BATCH_ROWS = 1 << 18
_COLUMNS = ["user_index", "item_index"]

Ids = npt.NDArray[np.integer]


def read_csr(dataset: Path, split: schema.Split, *, num_users: int, num_items: int) -> CSR:
    """Return the items of each user in a split.

    Memory is 4 bytes an interaction, twice that for a moment, and 8 a user, where the table is
    sorted as data_prep writes it; else it is held as a whole.

    Raises:
        UserError: the table is absent or damaged, or names users or items that the dataset has not.
    """
    path = schema.interactions_path(dataset, split)
    # int32 where it fits: halves what is kept.
    kind = np.int32 if num_items <= np.iinfo(np.int32).max else np.int64
    lengths = np.zeros(num_users, dtype=np.int64)
    parts: list[Ids] = [np.empty(0, dtype=kind)]
    before = (-1, -1)
    for batch in schema.read_batches(path, batch_size=_BATCH_ROWS, columns=_COLUMNS):
        users, items = (batch[name].to_numpy() for name in _COLUMNS)
        _check_ids(path, users, items, (num_users, num_items))
        if not _ascend(users, items, before):
            return CSR.from_pairs(*schema.read_interactions(dataset, split), num_users, num_items)
        before = (int(users[-1]), int(items[-1]))
        lengths[users[0] : users[-1] + 1] += np.bincount(users - users[0])
        parts.append(items.astype(kind))
    offsets = torch.zeros(num_users + 1, dtype=torch.int64)
    torch.cumsum(torch.from_numpy(lengths), 0, out=offsets[1:])
    return CSR(offsets, torch.from_numpy(np.concatenate(parts)), num_items)


def _check_ids(path: Path, users: Ids, items: Ids, limits: tuple[int, int]) -> None:
    for name, ids, limit in zip(_COLUMNS, (users, items), limits, strict=True):
        wrong = ids[(ids < 0) | (ids >= limit)]
        if len(wrong):
            raise UserError(
                f"{path} has {name} {wrong[0]}, outside of 0..{limit - 1}: it belongs to another "
                f"dataset. Run data_prep again."
            )


def _ascend(users: Ids, items: Ids, before: tuple[int, int]) -> bool:
    """Say whether each pair comes after the one before it."""
    step = np.diff(users, prepend=before[0])
    return not bool(((step < 0) | ((step == 0) & (np.diff(items, prepend=before[1]) <= 0))).any())
