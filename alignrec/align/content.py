"""The content features of all items in full-graph mode: input of the gate and target of REG."""

from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from alignrec.align.losses import gram_square, unit_rows
from alignrec.align.objective import Target

# Up to this many items the squared similarities of all pairs are kept (256 MiB at 8,192 items), so
# that ||X X^T|| of a batch is a small product; above it they are computed for each batch.
_MAX_TABLE_ITEMS = 8192
_BLOCK_ROWS = 1024


class Content(Target, Protocol):
    """What the gate reads, and what REG compares with."""

    def table(self) -> Float[Tensor, "num_items f"]:
        """Return h_enc of every item, as the gate reads it."""
        ...


class FixedContent(nn.Module):
    """Features that stay as the encoder made them."""

    features: Tensor
    _squares: Tensor | None

    def __init__(self, features: Float[Tensor, "num_items f"]) -> None:
        super().__init__()
        self.register_buffer("features", features, persistent=False)
        few = features.shape[0] <= _MAX_TABLE_ITEMS
        squares = _squared_similarities(unit_rows(features)) if few else None
        self.register_buffer("_squares", squares, persistent=False)

    def table(self) -> Float[Tensor, "num_items f"]:
        """See ``Content``."""
        return self.features

    def target(self, items: Int64[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """See ``Target``."""
        return unit_rows(self.features[items])

    def target_square(
        self, items: Int64[Tensor, " n"], target: Float[Tensor, "n f"], count: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """See ``Target``."""
        if self._squares is None:
            return gram_square(target, count)
        weights = self._squares.new_zeros(self._squares.shape[0])
        weights[items] = count.to(weights.dtype)
        return weights[items].double() @ (self._squares @ weights)[items].double()


class DriftingContent(nn.Module):
    """Features that are trained; REG's target is their current state, as in the released code."""

    def __init__(self, features: Float[Tensor, "num_items f"]) -> None:
        super().__init__()
        self.features = nn.Parameter(features.clone())

    def table(self) -> Float[Tensor, "num_items f"]:
        """See ``Content``."""
        return self.features

    def target(self, items: Int64[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """See ``Target``."""
        return unit_rows(self.features.detach()[items])

    def target_square(
        self, items: Int64[Tensor, " n"], target: Float[Tensor, "n f"], count: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """See ``Target``."""
        del items  # the target moves, so nothing is known about it beforehand
        return gram_square(target, count)


def _squared_similarities(unit: Float[Tensor, "n f"]) -> Float[Tensor, "n n"]:
    squares = unit.new_empty(unit.shape[0], unit.shape[0])
    for start in range(0, unit.shape[0], _BLOCK_ROWS):
        torch.mm(
            unit[start : start + _BLOCK_ROWS], unit.T, out=squares[start : start + _BLOCK_ROWS]
        )
    return squares.square_()
