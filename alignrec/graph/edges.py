"""The whole graph as files that are read a block at a time (dataset, kNN -> partitions).

No process holds all edges: interactions stay in the dataset's parquet file, item-item edges in
mapped arrays. What is in memory is a block of edges and vectors over nodes.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from alignrec.distributed.process_group import Rank
from alignrec.errors import UserError
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType, NodeType

Integers = npt.NDArray[np.integer]

# Edges that are read at once.
BLOCK_EDGES = 1 << 17
_COLUMNS = ["user_index", "item_index"]


@dataclasses.dataclass(frozen=True)
class EdgeBlock:
    """Consecutive edges of one type.

    Attributes:
        first: id of the first edge, counted within its type.
        source: ids of source nodes, shape (num_edges,).
        target: ids of destination nodes, shape (num_edges,).
    """

    first: int
    source: Integers
    target: Integers

    def __len__(self) -> int:
        return len(self.source)

    @property
    def ids(self) -> npt.NDArray[np.int64]:
        """Ids of the edges."""
        return np.arange(self.first, self.first + len(self.source))


@dataclasses.dataclass(frozen=True)
class Similar:
    """The normalised item-item matrix in CSR: row i holds what flows into item i.

    Attributes:
        indptr: int64 (num_items + 1,).
        indices: int32, ascending in a row; may be memory-mapped.
        values: float32; may be memory-mapped.
    """

    indptr: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]

    def rows(self, first: int, last: int) -> EdgeBlock:
        """Return the edges into the items ``first`` .. ``last - 1``."""
        start, stop = int(self.indptr[first]), int(self.indptr[last])
        target = np.repeat(np.arange(first, last), np.diff(self.indptr[first : last + 1]))
        return EdgeBlock(start, np.array(self.indices[start:stop]), target)


@dataclasses.dataclass(frozen=True)
class GraphStreams:
    """Nodes with their training degrees, and edges by blocks.

    Attributes:
        interactions: parquet file of (user_index, item_index), sorted by both.
        degree: node type -> number of training interactions of each node, int64.
        similar: item-item edges.
    """

    interactions: Path
    degree: Mapping[NodeType, npt.NDArray[np.int64]]
    similar: Similar

    @property
    def num_nodes(self) -> dict[NodeType, int]:
        """Number of nodes by type."""
        return {node_type: len(degree) for node_type, degree in self.degree.items()}

    @property
    def num_edges(self) -> dict[EdgeType, int]:
        """Number of edges by type; edge e of ``rev_rates`` is edge e of ``rates`` turned round."""
        num_train = int(self.degree[USER].sum())
        return {RATES: num_train, REV_RATES: num_train, SIMILAR: len(self.similar.indices)}

    def blocks(self, edge_type: EdgeType, rank: Rank | None = None) -> Iterator[EdgeBlock]:
        """Yield the edges of a type by ascending id.

        Args:
            edge_type: which edges.
            rank: yield this rank's share of them; None yields all.
        """
        if edge_type == SIMILAR:
            yield from self._similar_blocks(rank or Rank())
            return
        for block in interaction_blocks(self.interactions, rank or Rank()):
            if edge_type == RATES:
                yield block
            else:
                yield EdgeBlock(block.first, block.target, block.source)

    def weights(
        self, edge_type: EdgeType, ids: Integers, source: Integers, target: Integers
    ) -> npt.NDArray[np.float32]:
        """Return what messages along edges are multiplied by: 1 / sqrt(d_u d_i), or S_ij."""
        if edge_type == SIMILAR:
            return np.array(self.similar.values[ids])
        product = self.degree[edge_type[0]][source].astype(np.float64)
        product *= self.degree[edge_type[2]][target]
        return (1.0 / np.sqrt(product)).astype(np.float32)

    def _similar_blocks(self, rank: Rank) -> Iterator[EdgeBlock]:
        indptr = self.similar.indptr
        cuts = np.searchsorted(indptr, np.arange(0, indptr[-1] + BLOCK_EDGES, BLOCK_EDGES))
        cuts = np.unique(np.concatenate([[0], cuts.clip(max=len(indptr) - 1), [len(indptr) - 1]]))
        pairs = list(zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True))
        for first, last in pairs[rank.index :: rank.world_size]:
            yield self.similar.rows(first, last)


def interaction_blocks(path: Path, rank: Rank) -> Iterator[EdgeBlock]:
    """Yield a rank's share of interactions (user -> item) by row groups.

    Raises:
        UserError: the file is absent or damaged.
    """
    try:
        file = pq.ParquetFile(path)
        sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
        first = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
        for group in range(len(sizes))[rank.index :: rank.world_size]:
            position = first[group]
            for batch in file.iter_batches(BLOCK_EDGES, row_groups=[group], columns=_COLUMNS):
                users, items = (batch[name].to_numpy() for name in _COLUMNS)
                yield EdgeBlock(position, users, items)
                position += len(users)
    except (OSError, pa.ArrowException) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read ({reason}), so the dataset is not whole. Delete its folder and "
            f"run data_prep again."
        ) from error


def count_degrees(
    path: Path, *, num_users: int, num_items: int
) -> dict[NodeType, npt.NDArray[np.int64]]:
    """Return how many interactions each user and item has.

    Raises:
        UserError: there are none, one is of an unknown user or item, or they are not sorted by
            user and item, each pair once.
    """
    sizes = {USER: num_users, ITEM: num_items}
    degree = {node_type: np.zeros(size, dtype=np.int64) for node_type, size in sizes.items()}
    total = 0
    before = np.array([-1, -1])
    for block in interaction_blocks(path, Rank()):
        for node_type, ids in ((USER, block.source), (ITEM, block.target)):
            _check_ids(path, node_type, ids, sizes[node_type])
            np.add.at(degree[node_type], ids, 1)
        before = _check_order(path, block, before)
        total += len(block)
    if total == 0:
        raise UserError(
            f"{path} has no interactions, so there is no graph to learn from. Check the log that "
            f"data_prep read and its filters."
        )
    return degree


def _check_order(path: Path, block: EdgeBlock, before: Integers) -> Integers:
    """Check that each interaction comes after the one before it; return the last.

    A repeated one would count twice in degrees and samples, but once in mode full of align.
    """
    users, items = (
        np.concatenate([[first], ids])
        for first, ids in zip(before, (block.source, block.target), strict=True)
    )
    step = np.diff(users)
    wrong = np.flatnonzero((step < 0) | ((step == 0) & (np.diff(items) <= 0)))
    if len(wrong):
        row = int(wrong[0])
        raise UserError(
            f"{path} has (user_index {users[row + 1]}, item_index {items[row + 1]}) in row "
            f"{block.first + row} after ({users[row]}, {items[row]}), but interactions are sorted "
            f"by user and item, each once: a repeated one would count twice. Run data_prep again."
        )
    return np.array([users[-1], items[-1]])


def _check_ids(path: Path, node_type: NodeType, ids: Integers, limit: int) -> None:
    lowest, highest = int(ids.min(initial=0)), int(ids.max(initial=-1))
    if lowest < 0 or highest >= limit:
        raise UserError(
            f"{path} has {node_type}_index {highest if highest >= limit else lowest}, outside of "
            f"0..{limit - 1}. Run data_prep again."
        )
