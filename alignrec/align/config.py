"""Settings of stage 2: the align stage, and its ablation."""

import dataclasses
import typing
from typing import Literal

from alignrec.configuration import option
from alignrec.errors import UserError

_NUM_NEIGHBORS = 10
# Smallest temperature whose exponentials stay above float32's smallest number: exp(-2 / 0.03).
MIN_TEMPERATURE = 0.03


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
        "users or items sampled per node, one number a layer, -1 for all (mode sampled; default "
        "10 in each layer)",
    )
    num_similar: int | None = option(
        None, "similar items sampled per item, -1 for all (mode sampled; default 10)"
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

    temperature: float = option(
        0.2, "temperature of CCA's contrastive loss", minimum=MIN_TEMPERATURE
    )
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
        else:
            self._check_neighbors()
        if self.mode == "sampled" and self.paper_compatible:
            raise UserError(
                "paper_compatible=true trains the whole feature table, which mode sampled keeps "
                "read-only in the partitions. Set mode: full, or paper_compatible: false."
            )

    @property
    def neighbors(self) -> tuple[int, ...]:
        """Neighbours sampled per hop in mode sampled."""
        if self.num_neighbors is not None:
            return self.num_neighbors
        return (_NUM_NEIGHBORS,) * self.layers

    @property
    def similar_neighbors(self) -> tuple[int, ...]:
        """Similar items sampled per hop of the item-item graph; empty without content."""
        if not self.content:
            return ()
        return (self.num_similar if self.num_similar is not None else _NUM_NEIGHBORS,)

    def _check_full(self) -> None:
        for name in ("num_neighbors", "num_similar"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name}={getattr(self, name)} has no effect in mode full, which reads every "
                    f"neighbour. Remove it, or set mode: sampled."
                )
        if self.num_ranks > 1:
            raise UserError(
                f"num_ranks={self.num_ranks} has no effect in mode full, which is one process. Set "
                f"num_ranks: 1, or mode: sampled."
            )

    def _check_neighbors(self) -> None:
        numbers = self.neighbors
        if len(numbers) != self.layers:
            raise UserError(
                f"num_neighbors={list(numbers)} has {len(numbers)} hops, but layers={self.layers} "
                f"reads as many. Give one number a layer."
            )
        for name, number in [
            *(("num_neighbors", number) for number in numbers),
            *(("num_similar", number) for number in self.similar_neighbors),
        ]:
            if number < 1 and number != -1:
                raise UserError(
                    f"{name}: {number} neighbours cannot be sampled. Give at least 1, or -1 for "
                    f"all of them."
                )


@dataclasses.dataclass(frozen=True)
class AblationConfig(AlignConfig):
    """The same model, by default without content features, for comparison."""

    content: bool = option(
        False, typing.cast(str, AlignConfig.__dataclass_fields__["content"].metadata["help"])
    )
