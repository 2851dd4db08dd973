"""Schemas and readers of the dataset artifact (data_prep -> every later stage)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.errors import UserError

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

ITEMS = pa.schema(
    [
        pa.field("item_index", pa.int64(), nullable=False),
        pa.field("item_key", pa.string(), nullable=False),
        pa.field("title", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("has_image", pa.bool_(), nullable=False),
        pa.field("has_text", pa.bool_(), nullable=False),
        pa.field("removed", pa.bool_(), nullable=False),
    ]
)
USERS = pa.schema(
    [
        pa.field("user_index", pa.int64(), nullable=False),
        pa.field("user_key", pa.string(), nullable=False),
    ]
)
INTERACTIONS = pa.schema(
    [
        pa.field("user_index", pa.int64(), nullable=False),
        pa.field("item_index", pa.int64(), nullable=False),
        pa.field("rating", pa.float32()),
        pa.field("timestamp", pa.int64()),
    ]
)
SAMPLES = pa.schema(
    [
        pa.field("item_index", pa.int64(), nullable=False),
        pa.field("shard", pa.string(), nullable=False),
        pa.field("image_offset", pa.int64(), nullable=False),
        pa.field("image_bytes", pa.int64(), nullable=False),
        pa.field("json_offset", pa.int64(), nullable=False),
        pa.field("json_bytes", pa.int64(), nullable=False),
        # of the picture's bytes followed by the JSON's; absent in what older versions wrote
        pa.field("crc32", pa.uint32(), nullable=False),
    ]
)
QUARANTINE = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
    ]
)


def interactions_path(dataset: Path, split: Split) -> Path:
    """Return where a split's interactions lie in a dataset artifact."""
    return dataset / "interactions" / f"{split}.parquet"


def read_items(dataset: Path, columns: list[str] | None = None) -> pa.Table:
    """Return the item table in item_index order."""
    return read_table(dataset / "items.parquet", columns=columns)


def read_users(dataset: Path) -> pa.Table:
    """Return the user table in user_index order."""
    return read_table(dataset / "users.parquet")


def read_user_keys(dataset: Path, *, batch_size: int) -> Iterator[pa.RecordBatch]:
    """Yield the ``user_key`` of all users in user_index order, ``batch_size`` at a time."""
    return read_batches(dataset / "users.parquet", batch_size=batch_size, columns=["user_key"])


def read_removed_items(dataset: Path) -> npt.NDArray[np.int64]:
    """Return the item_index of those that the present catalogue does not have, ascending.

    They keep their number and row, but are never recommended or ranked.

    Raises:
        UserError: the item table does not say, because an older version of data_prep wrote it.
    """
    removed = read_items(dataset, ["removed"])["removed"].to_numpy()
    return np.flatnonzero(removed).astype(np.int64)


def read_samples(dataset: Path, columns: list[str] | None = None) -> pa.Table:
    """Return where each sample's bytes lie, in item_index order; shards are dictionary-encoded."""
    return read_table(dataset / "samples.parquet", columns=columns, dictionaries=["shard"])


def have_checksums(dataset: Path) -> bool:
    """Say whether the samples have checksums; older versions of data_prep wrote none.

    Raises:
        UserError: the table is absent or damaged.
    """
    path = dataset / "samples.parquet"
    try:
        return "crc32" in pq.read_schema(path).names
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_interactions(
    dataset: Path, split: Split
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (user_index, item_index) of a split, sorted by user and then item."""
    table = read_table(interactions_path(dataset, split), columns=["user_index", "item_index"])
    return table["user_index"].to_numpy(), table["item_index"].to_numpy()


def read_table(
    path: Path,
    *,
    columns: list[str] | None = None,
    filters: list[tuple[str, str, Any]] | None = None,
    dictionaries: list[str] | None = None,
) -> pa.Table:
    """Return a table of a dataset, the given columns of the rows that pass ``filters``.

    Args:
        path: of the table.
        columns: their names; all without any.
        filters: what rows must pass.
        dictionaries: columns of strings that stay numbers of distinct strings.

    Raises:
        UserError: the file is absent or damaged, or lacks a column.
    """
    try:
        return pq.read_table(path, columns=columns, filters=filters, read_dictionary=dictionaries)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def read_batches(
    path: Path, *, batch_size: int, columns: list[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield a table of a dataset, at most ``batch_size`` rows at a time.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        yield from pq.ParquetFile(path).iter_batches(batch_size, columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{path} cannot be read ({reason}), so the dataset is not whole. Delete its folder and run "
        f"data_prep again."
    )
