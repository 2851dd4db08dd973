"""Rows of other ranks' nodes that are asked for again and again, and counts of what travels."""

import dataclasses
import threading

import torch
from jaxtyping import Bool, Int64, Shaped
from torch import Tensor

# Slots that are looked at for each row that needs one.
_WINDOW = 4


class RowCache:
    """Recently used rows among those that were asked for more than once.

    Rows that are asked for a single time, which most are where popularity is uneven, do not push
    out others. What is found here is what the owner would send, so a cache changes no result.
    """

    def __init__(self, num_nodes: int, capacity: int, *, dim: int, dtype: torch.dtype) -> None:
        """Make an empty cache.

        Args:
            num_nodes: nodes in the whole graph; 5 bytes are kept for each.
            capacity: rows that are kept at most.
            dim: length of a row.
            dtype: of the rows.
        """
        self._slot = torch.full((num_nodes,), -1, dtype=torch.int32)
        self._asked = torch.zeros(num_nodes, dtype=torch.bool)
        self._node = torch.full((capacity,), -1, dtype=torch.int64)
        self._used = torch.zeros(capacity, dtype=torch.int64)
        self._rows = torch.empty((capacity, dim), dtype=dtype)
        self._time = 0
        self._hand = 0

    def has(self, ids: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell which rows are here."""
        present: Tensor = self._slot.index_select(0, ids) >= 0
        return present

    def read(self, ids: Int64[Tensor, " n"]) -> Shaped[Tensor, "n dim"]:
        """Return rows that are here."""
        slots = self._slot.index_select(0, ids).to(torch.int64)
        self._time += 1
        self._used[slots] = self._time
        rows: Tensor = self._rows.index_select(0, slots)
        return rows

    def offer(self, ids: Int64[Tensor, " n"], rows: Shaped[Tensor, "n dim"]) -> None:
        """Keep those rows that were offered before, in place of ones not used for long.

        Args:
            ids: distinct nodes whose rows are not here.
            rows: their rows.
        """
        again = self._asked.index_select(0, ids).nonzero()[: len(self._node), 0]
        self._asked[ids] = True
        if not len(again):
            return
        ids, rows = ids[again], rows[again]
        slots = self._victims(len(ids))
        gone = self._node[slots]
        self._slot[gone[gone >= 0]] = -1
        self._slot[ids] = slots.to(torch.int32)
        self._node[slots], self._rows[slots] = ids, rows
        self._time += 1
        self._used[slots] = self._time

    def _victims(self, count: int) -> Int64[Tensor, " count"]:
        """Return the least recently used of the next few slots: to sort all would cost more."""
        capacity = len(self._node)
        window = torch.arange(self._hand, self._hand + min(_WINDOW * count, capacity)) % capacity
        oldest = self._used[window].topk(count, largest=False).indices
        self._hand = (self._hand + len(window)) % capacity
        slots: Tensor = window[oldest]
        return slots


@dataclasses.dataclass
class Traffic:
    """What a loader has asked of other ranks since it was last asked for.

    Attributes:
        nodes: nodes whose neighbours were sampled.
        remote_nodes: those of other ranks among them.
        rows: rows of content features that batches needed.
        remote_rows: those of other ranks among them.
        cached_rows: remote rows that were in the cache.
        wait_seconds: how long the consumer waited for batches.
    """

    nodes: int = 0
    remote_nodes: int = 0
    rows: int = 0
    remote_rows: int = 0
    cached_rows: int = 0
    wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        self._lock = threading.Lock()  # batches are made in a thread

    def add(self, **counts: int | float) -> None:
        """Count more."""
        with self._lock:
            for name, count in counts.items():
                setattr(self, name, getattr(self, name) + count)

    def take(self) -> dict[str, float]:
        """Return shares and seconds for the telemetry and start to count afresh."""
        with self._lock:
            counts = {name: float(n) for name, n in dataclasses.asdict(self).items()}
            for field in dataclasses.fields(self):
                setattr(self, field.name, field.default)
        return {
            "sampling/remote_node_share": _share(counts["remote_nodes"], counts["nodes"]),
            "sampling/remote_row_share": _share(counts["remote_rows"], counts["rows"]),
            "sampling/cache_hit_rate": _share(counts["cached_rows"], counts["remote_rows"]),
            "sampling/wait_seconds": counts["wait_seconds"],
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
