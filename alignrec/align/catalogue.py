"""Which rows of tables belong to whom (dataset -> lineage of embeddings).

item_index and user_index stay from one version of a dataset to the next, and new ones are appended.
So a later version of the same catalogue begins with the same keys; digests of them tell.
"""

import hashlib
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from alignrec.data.schema import read_batches
from alignrec.errors import UserError

Table = Literal["item", "user"]
TABLES: tuple[Table, ...] = ("item", "user")
_BLOCK_ROWS = 1 << 17


def key_digest(dataset: Path, table: Table, *, num_rows: int) -> str:
    """Return a digest of the keys of the first rows of a dataset's table, a block in memory.

    Args:
        dataset: folder of the artifact.
        table: items or users.
        num_rows: rows that count; the table has at least as many.

    Raises:
        UserError: the table is absent or damaged, or a key is null.
    """
    lengths, letters = hashlib.sha256(), hashlib.sha256()  # two, so that blocks do not show
    left = num_rows
    path = dataset / f"{table}s.parquet"
    for batch in read_batches(path, batch_size=_BLOCK_ROWS, columns=[f"{table}_key"]):
        keys = batch.column(0)[:left].cast(pa.string())
        if keys.null_count:
            raise UserError(
                f"{path} has rows without {table}_key, so nothing tells whose they are. Run "
                f"data_prep again."
            )
        left -= len(keys)
        lengths.update(np.asarray(pc.binary_length(keys), dtype="<i8").tobytes())
        letters.update(_letters(keys))
        if left == 0:
            break
    return hashlib.sha256(lengths.digest() + letters.digest()).hexdigest()


def digests(dataset: Path, num_rows: dict[Table, int]) -> dict[str, str]:
    """Return the digest of each table's first rows, by table."""
    return {table: key_digest(dataset, table, num_rows=num_rows[table]) for table in TABLES}


def _letters(keys: pa.StringArray) -> bytes:
    """Return all keys in a row."""
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(keys)], keys), "")
    return str(joined[0].as_py()).encode()
