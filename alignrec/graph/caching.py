"""What other ranks' nodes have and is asked for again and again, and counts of what travels."""

import dataclasses
import threading
from collections.abc import Callable

import torch
from jaxtyping import Bool, Int32, Int64, Shaped
from torch import Tensor

from alignrec.distributed.exchange import ragged_index
from alignrec.graph.hashing import GOLDEN

# Slots that are looked at for each row that needs one.
_WINDOW = 4
# Places that a sample may lie in: their keys fill a cache line.
_WAYS = 8
# Spreads consecutive keys: 2**64 over the golden ratio (Knuth, TAOCP 3, 6.4), as a signed number.
_MULTIPLIER = GOLDEN - 2**64


class RowCache:
    """Recently used rows among those that were asked for more than once.

    Rows that are asked for a single time, which most are where popularity is uneven, do not push
    out others. What is found here is what the owner would send, so a cache changes no result.
    """

    def __init__(self, num_nodes: int, capacity: int, *, dim: int, dtype: torch.dtype) -> None:
        """Make an empty cache.

        Args:
            num_nodes: nodes in the whole graph; 5 bytes are kept for each.
            capacity: rows that are kept at most; 16 bytes beside each.
            dim: length of a row.
            dtype: of the rows.
        """
        self._slot = torch.full((num_nodes,), -1, dtype=torch.int32)
        self._asked = torch.zeros(num_nodes, dtype=torch.bool)
        self._node = torch.full((capacity,), -1, dtype=torch.int64)
        self._used = torch.zeros(capacity, dtype=torch.int64)
        self._rows = torch.zeros((capacity, dim), dtype=dtype)
        self._time = 0
        self._hand = 0

    @classmethod
    def within(
        cls, size_bytes: int, *, num_nodes: int, num_rows: int, dim: int, dtype: torch.dtype
    ) -> "RowCache | None":
        """Make one of a size in bytes, for ``num_rows`` rows at most; None if none would fit."""
        capacity = min((size_bytes - 5 * num_nodes) // (dim * dtype.itemsize + 16), num_rows)
        return cls(num_nodes, capacity, dim=dim, dtype=dtype) if capacity > 0 else None

    def has(self, ids: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Tell which rows are here."""
        present: Tensor = self._slot.index_select(0, ids) >= 0
        return present

    def read(
        self, ids: Int64[Tensor, " n"], *, out: Shaped[Tensor, "n dim"] | None = None
    ) -> Shaped[Tensor, "n dim"]:
        """Return rows, in ``out`` where it is given; those that are not here have no meaning."""
        slots = self._slot.index_select(0, ids)
        self._time += 1
        self._used[slots[slots >= 0].to(torch.int64)] = self._time
        rows: Tensor = torch.index_select(self._rows, 0, slots.clamp_min(0), out=out)
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


class SampleCache:
    """Samples of other ranks' nodes, which stay the same for an epoch.

    A key may lie in the few places of its bucket. First come, first kept, until these are full:
    nodes that are asked for often come early. Memory follows the capacity, not the graph. What is
    found here is what the owner would send, so a cache changes no sample.
    """

    def __init__(self, capacity: int, *, width: int) -> None:
        """Make an empty cache.

        Args:
            capacity: rows that are kept at most; 8 bytes beside each.
            width: int32 numbers in a row.
        """
        ways = min(_WAYS, capacity)
        self._keys = torch.full((capacity // ways, ways), -1, dtype=torch.int64)
        self._rows = torch.zeros((self._keys.numel(), width), dtype=torch.int32)
        self._epoch = -1

    @classmethod
    def within(cls, size_bytes: int, *, num_rows: int, width: int) -> "SampleCache | None":
        """Make one of a size in bytes for a graph of ``num_rows`` rows; None if none would fit."""
        # Twice the room, where there is memory: buckets fill unevenly.
        capacity = min(size_bytes // (4 * width + 8), 2 * num_rows)
        return cls(capacity, width=width) if capacity > 0 else None

    def start_epoch(self, epoch: int) -> None:
        """Forget the samples of other epochs."""
        if epoch != self._epoch:
            self._keys.fill_(-1)
            self._epoch = epoch

    def find(self, keys: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        """Return where the rows are; -1 for those that are not here."""
        buckets = self._bucket(keys)
        same = (self._keys.index_select(0, buckets) == keys[:, None]).to(torch.uint8)
        found, way = same.max(dim=1)
        return torch.where(found > 0, buckets * self._keys.shape[1] + way, -1)

    def read(self, places: Int64[Tensor, " n"]) -> Int32[Tensor, "n width"]:
        """Return the rows at the places that were found; others have no meaning."""
        rows: Tensor = self._rows.index_select(0, places.clamp_min(0))
        return rows

    def keep(self, keys: Int64[Tensor, " n"], rows: Int32[Tensor, "n width"]) -> None:
        """Keep rows of distinct keys that are not here, as far as there is room for them."""
        ways = self._keys.shape[1]
        buckets = self._bucket(keys)
        used = (self._keys.index_select(0, buckets) >= 0).sum(dim=1)
        free = (used < ways).nonzero()[:, 0]  # soon few: only these are sorted
        free = free[torch.argsort(buckets[free], stable=True)]
        sizes = torch.unique_consecutive(buckets[free], return_counts=True)[1]
        way = used[free] + ragged_index(torch.zeros_like(sizes), sizes)
        kept = free[way < ways]
        places = buckets[kept] * ways + way[way < ways]
        self._keys.view(-1)[places] = keys[kept]
        self._rows[places] = rows[kept]

    def _bucket(self, keys: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
        return ((keys * _MULTIPLIER) >> 32) % len(self._keys)  # % is not negative


@dataclasses.dataclass
class Traffic:
    """What a loader has asked of other ranks since it was last asked for.

    Attributes:
        nodes: nodes whose neighbours were sampled.
        remote_nodes: those of other ranks among them.
        cached_nodes: remote nodes whose samples were in the cache.
        rows: rows of content features that batches needed.
        remote_rows: those of other ranks among them.
        cached_rows: remote rows that were in the cache.
        wait_seconds: how long the consumer waited for batches.
    """

    nodes: int = 0
    remote_nodes: int = 0
    cached_nodes: int = 0
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

    def take(self, total: Callable[[Tensor], Tensor] = lambda own: own) -> dict[str, float]:
        """Return shares and seconds for the telemetry and start to count afresh.

        Args:
            total: sums numbers over the ranks, like ``Exchange.sum``; default: this rank's alone.
        """
        with self._lock:
            own = dataclasses.asdict(self)
            for field in dataclasses.fields(self):
                setattr(self, field.name, field.default)
        sums = total(torch.tensor([*own.values(), 1.0], dtype=torch.float64)).tolist()
        counts, num_ranks = dict(zip(own, sums, strict=False)), sums[-1]
        return {
            "sampling/remote_node_share": _share(counts["remote_nodes"], counts["nodes"]),
            "sampling/sample_hit_rate": _share(counts["cached_nodes"], counts["remote_nodes"]),
            "sampling/remote_row_share": _share(counts["remote_rows"], counts["rows"]),
            "sampling/cache_hit_rate": _share(counts["cached_rows"], counts["remote_rows"]),
            "sampling/wait_seconds": counts["wait_seconds"] / num_ranks,
        }


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
