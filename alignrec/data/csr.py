"""Which columns belong to which row, e.g. the items of a user (interactions -> losses, ranking)."""

import dataclasses
import functools

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Bool, Int, Int64
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class CSR:
    """Rows of sorted, distinct column numbers.

    Attributes:
        row_offsets: row r lists ``columns[row_offsets[r]:row_offsets[r + 1]]``.
        columns: ascending within a row; of a CSR that was read in parts int32.
        num_cols: columns are below this; ``num_rows * num_cols`` must fit in int64.
    """

    row_offsets: Int64[Tensor, " num_rows_plus_one"]
    columns: Int[Tensor, " num_entries"]
    num_cols: int

    @classmethod
    def from_pairs(
        cls,
        rows: Int64[Tensor, " num_pairs"] | npt.ArrayLike,
        cols: Int64[Tensor, " num_pairs"] | npt.ArrayLike,
        num_rows: int,
        num_cols: int,
    ) -> "CSR":
        """Build from (row, column) pairs in any order; a repeated pair counts once.

        Raises:
            ValueError: a pair lies outside of ``num_rows`` x ``num_cols``.
        """
        row, col = _int64(rows), _int64(cols)
        for name, values, limit in (("row", row, num_rows), ("column", col, num_cols)):
            if values.numel() and (int(values.min()) < 0 or int(values.max()) >= limit):
                raise ValueError(
                    f"{name} numbers from {int(values.min())} to {int(values.max())} are not all "
                    f"within 0..{limit - 1}: they belong to another dataset. Give the counts of "
                    f"the dataset that the pairs come from."
                )
        keys = row * num_cols + col
        if keys.numel() > 1 and not bool((keys[1:] > keys[:-1]).all()):
            keys = torch.unique(keys)  # sorted
            row, col = keys // num_cols, keys % num_cols
        lengths = torch.bincount(row, minlength=num_rows)
        return cls(_offsets(lengths), col.contiguous(), num_cols)

    @property
    def num_rows(self) -> int:
        """Number of rows, empty ones included."""
        return self.row_offsets.numel() - 1

    @property
    def row_lengths(self) -> Int64[Tensor, " num_rows"]:
        """Number of columns of each row."""
        return self.row_offsets.diff()

    @functools.cached_property
    def rows(self) -> Int64[Tensor, " num_entries"]:
        """Row of each entry of ``columns``."""
        index = torch.arange(self.num_rows, device=self.columns.device)
        return index.repeat_interleave(self.row_lengths)

    @functools.cached_property
    def _keys(self) -> Int64[Tensor, " num_entries"]:
        return self.rows * self.num_cols + self.columns  # ascending

    def row(self, index: int) -> Int64[Tensor, " length"]:
        """Return the columns of one row."""
        return self.columns[int(self.row_offsets[index]) : int(self.row_offsets[index + 1])].long()

    def select(self, rows: Int64[Tensor, " num_selected"]) -> "CSR":
        """Return the given rows, in the given order, as rows 0, 1, ... of a new CSR."""
        lengths = self.row_lengths[rows]
        offsets = _offsets(lengths)
        # Entry e of the new row r lies e - offsets[r] behind the start of the old row.
        shift = (self.row_offsets[rows] - offsets[:-1]).repeat_interleave(lengths)
        position = torch.arange(int(offsets[-1]), device=self.columns.device) + shift
        return type(self)(offsets, self.columns[position].long(), self.num_cols)

    def keep_columns(self, kept: Bool[Tensor, " num_cols"]) -> "CSR":
        """Return the same rows without the columns that ``kept`` marks False."""
        entries = kept[self.columns]
        lengths = torch.bincount(self.rows[entries], minlength=self.num_rows)
        return type(self)(_offsets(lengths), self.columns[entries].long(), self.num_cols)

    def contains(self, topk: Int64[Tensor, "num_rows k"]) -> Bool[Tensor, "num_rows k"]:
        """Tell for each entry of row r of ``topk`` whether row r lists it; -1 is never listed."""
        rows = torch.arange(self.num_rows, device=topk.device).unsqueeze(1).expand_as(topk)
        return self.contains_pairs(rows, topk)

    def contains_pairs(self, rows: Int64[Tensor, "*n"], cols: Int64[Tensor, "*n"]) -> Tensor:
        """Tell for each pair whether it is listed, by one binary search each; column -1 never is.

        Returns:
            bool, shaped like ``rows``.
        """
        wanted = rows * self.num_cols + cols
        if self._keys.numel() == 0:
            return torch.zeros_like(wanted, dtype=torch.bool)
        position = torch.searchsorted(self._keys, wanted).clamp_(max=self._keys.numel() - 1)
        return (self._keys[position] == wanted) & (cols >= 0)

    def to(self, device: torch.device) -> "CSR":
        """Return the same rows on another device."""
        return type(self)(self.row_offsets.to(device), self.columns.to(device), self.num_cols)


def _offsets(lengths: Int64[Tensor, " n"]) -> Int64[Tensor, " n_plus_one"]:
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def _int64(numbers: Tensor | npt.ArrayLike) -> Int64[Tensor, " n"]:
    if isinstance(numbers, Tensor):
        return numbers.long()
    return torch.from_numpy(np.array(numbers, dtype=np.int64))  # a copy: tables are read-only
