"""Interactions with their split in, the files of the artifact out (interactions -> artifact).

Users come in ranges of rising user_index, so that only one range is in memory; every pair of a user
is in one range, so a leak between splits shows there.
"""

import contextlib
import dataclasses
import itertools
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.data import schema
from alignrec.data.schema import SPLITS
from data_prep.log import UNKNOWN_TIME
from data_prep.splits import check_leakage
from data_prep.values import Ints

RANGE_ROWS = 1 << 20
# Neighbouring rows have the same user; items and times are too many for a dictionary.
_DICTIONARIES = ["user_index", "rating"]


@dataclasses.dataclass(frozen=True)
class LabelledRows:
    """All interactions of a range of users.

    Attributes:
        user: (n,) user_index.
        item: (n,) item_index.
        rating: (n,) NaN where unknown.
        time: (n,) ``UNKNOWN_TIME`` where unknown.
        label: (n,) split.
    """

    user: Ints
    item: Ints
    rating: npt.NDArray[np.float32]
    time: Ints
    label: npt.NDArray[np.int8]

    def __len__(self) -> int:
        return len(self.user)

    def select(self, rows: npt.NDArray[np.bool_] | npt.NDArray[np.intp]) -> "LabelledRows":
        """Return the given rows."""
        fields = dataclasses.fields(self)
        return LabelledRows(**{field.name: getattr(self, field.name)[rows] for field in fields})


class InteractionFiles:
    """Writer of ``interactions/{train,valid,test}.parquet``.

    Attributes:
        counts: num_train, num_valid and num_test so far.
    """

    def __init__(self, folder: Path) -> None:
        (folder / "interactions").mkdir(exist_ok=True)
        self.counts = {f"num_{split}": 0 for split in SPLITS}
        self._files = contextlib.ExitStack()
        self._writers = [
            self._files.enter_context(
                pq.ParquetWriter(
                    schema.interactions_path(folder, split),
                    schema.INTERACTIONS,
                    use_dictionary=_DICTIONARIES,
                )
            )
            for split in SPLITS
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()

    def add(self, rows: LabelledRows) -> None:
        """Write the next users' interactions, in any order among themselves.

        Raises:
            UserError: a pair is in two splits, or twice in one.
        """
        if not len(rows):
            return
        first = int(rows.user.min())
        rows = rows.select(np.argsort((rows.user - first) * (int(rows.item.max()) + 1) + rows.item))
        check_leakage(rows.user, rows.item, rows.label)
        for label, (split, writer) in enumerate(zip(SPLITS, self._writers, strict=True)):
            part = rows.select(rows.label == label)
            if len(part):
                writer.write_table(_table(part))
                self.counts[f"num_{split}"] += len(part)


def user_ranges(num_rows: Ints) -> list[tuple[int, int]]:
    """Divide users into ranges of about ``RANGE_ROWS`` rows.

    Args:
        num_rows: rows of each user, by user_index.

    Returns:
        Begin and end of each range of user_index.
    """
    before = np.cumsum(num_rows) - num_rows
    cuts = np.flatnonzero(np.diff(before // RANGE_ROWS)) + 1
    bounds = [0, *cuts.tolist(), len(num_rows)]
    return list(itertools.pairwise(bounds))


def _table(rows: LabelledRows) -> pa.Table:
    columns = [
        rows.user,
        rows.item,
        pa.array(rows.rating, mask=np.isnan(rows.rating)),
        pa.array(rows.time, mask=rows.time == UNKNOWN_TIME),
    ]
    return pa.table(columns, schema=schema.INTERACTIONS)
