"""Records sorted into files by a number, so that each file fits in memory (streams -> files)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

Records = npt.NDArray[np.void]


def append_by_bucket(
    records: Records, bucket: npt.NDArray[np.integer], path_of: Callable[[int], Path]
) -> None:
    """Append each record to the file of its bucket, in the order given."""
    if not len(records):
        return
    order = np.argsort(bucket, kind="stable")
    numbers, starts = np.unique(bucket[order], return_index=True)
    for number, mine in zip(numbers.tolist(), np.split(order, starts[1:]), strict=True):
        with path_of(number).open("ab") as file:
            records[mine].tofile(file)
