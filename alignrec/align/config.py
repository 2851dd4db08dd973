"""Settings of stage 2: the align stage, and its ablation."""

import dataclasses
import typing
from typing import Literal

from alignrec.configuration import option
from alignrec.errors import UserError

DEFAULT_NUM_NEIGHBORS = 10


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """How embeddings are trained from interactions and content features."""

    mode: Literal["full", "sampled"] = option(
        "full",
        "full: the whole graph in each step, one process; sampled: neighbours, any number of ranks",
    )
    num_ranks: int = option(
        1, "processes that train together (mode sampled)", minimum=1, affects_result=False
    )
    num_neighbors: tuple[int, ...] | None = option(
        None,
        "neighbours sampled per node and edge type, one number a hop, -1 for all (mode sampled; "
        "default 10 in each hop)",
    )
    seed: int = option(0, "seed of initial values, order, negatives and sampling", minimum=0)

    embedding_dim: int = option(64, "size d of embeddings", minimum=1)
    layers: int = option(2, "number L of propagations over the user-item graph", minimum=1)
    content: bool = option(
        True,
        "use content features; false leaves ID propagation with BPR, UIA and L2 alone, whatever "
        "the weights of CCA and REG",
    )
    paper_compatible: bool = option(
        False, "train the feature table and let REG's target drift with it, as the released code"
    )

    temperature: float = option(0.2, "temperature of CCA's contrastive loss", minimum=1e-3)
    cca_weight: float = option(0.01, "weight of content-category alignment", minimum=0)
    uia_weight: float = option(0.1, "weight of user-item alignment", minimum=0)
    reg_weight: float = option(0.1, "weight of REG, similarity to the content encoder", minimum=0)
    l2_weight: float = option(1e-4, "weight of the squared norms of a batch", minimum=0)

    learning_rate: float = option(1e-3, "Adam's learning rate in the first epoch", minimum=0)
    learning_rate_decay: float = option(
        0.96, "factor on the learning rate per 50 epochs", minimum=0, maximum=1
    )
    batch_size: int = option(2048, "triples per step over all ranks", minimum=1)
    epochs: int = option(1000, "passes over the training interactions at most", minimum=1)
    evaluate_every: int = option(1, "epochs between evaluations on validation", minimum=1)
    patience: int = option(
        30, "evaluations without a better validation Recall@20 before training stops", minimum=1
    )
    evaluation_block: int = option(
        1024, "users ranked at once in an evaluation", minimum=1, affects_result=False
    )
    checkpoint_steps: int = option(
        500, "optimizer steps between checkpoints", minimum=1, affects_result=False
    )

    def __post_init__(self) -> None:
        if self.mode == "full":
            self._check_full()
        elif self.num_neighbors is not None:
            self._check_neighbors(self.num_neighbors)
        if self.mode == "sampled" and self.paper_compatible:
            raise UserError(
                "paper_compatible=true trains the whole feature table, which mode sampled keeps "
                "read-only in the partitions. Set mode: full, or paper_compatible: false."
            )

    @property
    def num_hops(self) -> int:
        """Hops that a node's representation reads: h_mm of a user reads its items' neighbours."""
        return max(self.layers, 2) if self.content else self.layers

    @property
    def neighbors(self) -> tuple[int, ...]:
        """Neighbours sampled per hop in mode sampled."""
        if self.num_neighbors is not None:
            return self.num_neighbors
        return (DEFAULT_NUM_NEIGHBORS,) * self.num_hops

    def _check_full(self) -> None:
        if self.num_neighbors is not None:
            raise UserError(
                f"num_neighbors={list(self.num_neighbors)} has no effect in mode full, which "
                f"reads every neighbour. Remove it, or set mode: sampled."
            )
        if self.num_ranks > 1:
            raise UserError(
                f"num_ranks={self.num_ranks} has no effect in mode full, which is one process. Set "
                f"num_ranks: 1, or mode: sampled."
            )

    def _check_neighbors(self, numbers: tuple[int, ...]) -> None:
        if len(numbers) != self.num_hops:
            raise UserError(
                f"num_neighbors={list(numbers)} has {len(numbers)} hops, but layers={self.layers} "
                f"reads {self.num_hops}. Give one number a hop."
            )
        if any(number < 1 and number != -1 for number in numbers):
            raise UserError(
                f"num_neighbors={list(numbers)}: a hop reads at least one neighbour, or -1 for "
                f"all of them. Correct the list."
            )


@dataclasses.dataclass(frozen=True)
class AblationConfig(AlignConfig):
    """The same model, by default without content features, for comparison."""

    content: bool = option(
        False, typing.cast(str, AlignConfig.__dataclass_fields__["content"].metadata["help"])
    )
