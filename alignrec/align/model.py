"""Trained parts of stage 2 that both modes share: initial ID embeddings and the content gate."""

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

USER_TABLE = 0
ITEM_TABLE = 1
_BLOCK_ROWS = 4096


def initial_rows(
    ids: Int64[Tensor, " n"], dim: int, *, num_rows: int, table: int, seed: int
) -> Float[Tensor, "n d"]:
    """Return rows of a Xavier-uniform table (Glorot & Bengio 2010).

    A row depends on the seed and its number only, so a table that is spread over ranks starts like
    one that is whole.

    Args:
        ids: numbers of the rows.
        dim: row length.
        num_rows: rows of the whole table, which sets the range.
        table: ``USER_TABLE`` or ``ITEM_TABLE``.
        seed: of the run.
    """
    bound = (6.0 / (num_rows + dim)) ** 0.5
    result = torch.empty(len(ids), dim)
    block_of = ids // _BLOCK_ROWS
    for block in torch.unique(block_of).tolist():
        rng = np.random.default_rng((seed, table, block))
        rows = rng.uniform(-bound, bound, size=(_BLOCK_ROWS, dim)).astype(np.float32)
        inside = block_of == block
        result[inside] = torch.from_numpy(rows)[ids[inside] % _BLOCK_ROWS]
    return result


class ContentGate(nn.Module):
    """sigmoid(MLP(h_enc)): what an item's content lets through of its ID embedding."""

    def __init__(self, num_features: int, dim: int, *, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.project = nn.Linear(num_features, dim)
        self.gate = nn.Linear(dim, dim)
        for layer in (self.project, self.gate):
            nn.init.xavier_uniform_(layer.weight, generator=generator)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Float[Tensor, "n f"]) -> Float[Tensor, "n d"]:
        """Return a factor in 0..1 for each dimension of each item's ID embedding."""
        gate: Tensor = self.gate(self.project(features)).sigmoid()
        return gate
