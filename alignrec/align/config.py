"""Settings of stage 2: the align stage, and its ablation."""

import dataclasses
import typing
from pathlib import Path
from typing import Literal

from alignrec import artifacts
from alignrec.configuration import option, watchdog_option
from alignrec.errors import UserError
from alignrec.stage import earlier_manifest

_NUM_NEIGHBORS = 10
_CACHE_BYTES = 1 << 27
# Smallest temperature whose exponentials stay above float32's smallest number: exp(-2 / 0.03).
MIN_TEMPERATURE = 0.03


@dataclasses.dataclass(frozen=True)
class InitialConfig:
    """Earlier embeddings to go on from, such as yesterday's."""

    embeddings: Path | None = option(
        None,
        "folder of an embeddings artifact of the same catalogue, smaller perhaps; may be the one "
        "that this stage writes",
        affects_result=False,  # what lies there counts: AlignConfig.earlier
    )
    optional: bool = option(
        False,
        "start at random where nothing is there yet, as on the first night",
        affects_result=False,
    )
    learning_rate_factor: float = option(
        1.0, "factor on the learning rate of a run that goes on from embeddings", minimum=0
    )

    def __post_init__(self) -> None:
        """Refuse settings that another one makes idle.

        Raises:
            UserError: a setting for embeddings that are not named.
        """
        if self.embeddings is not None:
            return
        for name in ("optional", "learning_rate_factor"):
            if getattr(self, name) != getattr(InitialConfig, name):
                raise UserError(
                    f"initial.{name}={getattr(self, name)} has no effect without "
                    f"initial.embeddings. Leave it out or name a folder."
                )


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

    initial: InitialConfig = option(InitialConfig(), "embeddings to go on from")

    embedding_dim: int = option(64, "size d of embeddings", minimum=1)
    layers: int = option(2, "number L of propagations over the user-item graph", minimum=1)
    content_layers: int = option(
        1, "number of propagations of content over the item-item graph", minimum=1
    )
    edge_dropout: float = option(
        0.0,
        "share of the training interactions that propagation leaves out, others in each epoch "
        "(mode full; mode sampled has num_neighbors)",
        minimum=0,
        maximum=0.95,
    )
    content: bool = option(
        True,
        "use content features; false leaves ID propagation with BPR, UIA and L2 alone, whatever "
        "the weights of CCA and REG",
    )
    paper_compatible: bool = option(
        False, "train the feature table and let REG's target drift with it, as the released code"
    )
    cold_items: Literal["similar", "own"] | None = option(
        None,
        "H_id of an item without training interactions: similar: the mean of its similar items'; "
        "own: its own ID embedding's share (default similar; own without content or with "
        "paper_compatible)",
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
    evaluate_users: int | None = option(
        None,
        "users judged in each evaluation during training at most, the same ones each time; "
        "default: all",
        minimum=1,
    )
    evaluation_block: int = option(
        1024, "users ranked at once in an evaluation", minimum=1, affects_result=False
    )
    log_steps: int = option(
        500,
        "optimizer steps between rows of the history within an epoch",
        minimum=1,
        affects_result=False,
    )
    checkpoint_steps: int = option(
        500, "optimizer steps between checkpoints", minimum=1, affects_result=False
    )
    cache_bytes: int = option(
        _CACHE_BYTES,
        "memory of a rank for content features of other ranks' items; 0: none (mode sampled)",
        minimum=0,
        affects_result=False,
    )
    sample_cache_bytes: int = option(
        _CACHE_BYTES,
        "memory of a rank for neighbours of other ranks' nodes; 0: none (mode sampled)",
        minimum=0,
        affects_result=False,
    )
    timeout_seconds: float = option(
        300.0, "how long a rank waits for a silent peer", minimum=1, affects_result=False
    )
    watchdog_seconds: float | None = watchdog_option()

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
        self._check_start()

    @property
    def uses_gpu(self) -> bool:
        """Whether a GPU would be of use: mode sampled computes on the CPU."""
        return self.mode == "full"

    @property
    def goes_on_from(self) -> Path | None:
        """Folder of the earlier embeddings that are named."""
        return self.initial.embeddings

    def earlier(self) -> artifacts.Manifest | None:
        """Return the manifest of the embeddings that training goes on from, if there are any.

        Raises:
            UserError: they are named, not optional, and not there, or of another kind.
            StageFailure: they are being replaced by another run.
        """
        return earlier_manifest(
            self.initial.embeddings,
            "embeddings",
            optional=self.initial.optional,
            setting="initial.embeddings",
        )

    def going_on(self) -> "AlignConfig":
        """Return the settings of a run that goes on from earlier embeddings."""
        rate = self.learning_rate * self.initial.learning_rate_factor
        return dataclasses.replace(self, learning_rate=rate)

    @property
    def cold_from_similar(self) -> bool:
        """Whether items without training interactions take H_id from their similar items."""
        if self.cold_items is not None:
            return self.cold_items == "similar"
        return self.content and not self.paper_compatible

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
        number = self.num_similar if self.num_similar is not None else _NUM_NEIGHBORS
        return (number,) * self.content_layers

    def _check_start(self) -> None:
        if self.paper_compatible and self.initial.embeddings is not None:
            raise UserError(
                "paper_compatible=true trains a table of features that belongs to one catalogue, "
                "so it cannot go on from initial.embeddings. Leave one of the two out."
            )
        if self.cold_items == "similar" and not self.content:
            raise UserError(
                "cold_items=similar needs the item-item graph, which content=false does not read. "
                "Leave cold_items out."
            )

    def _check_full(self) -> None:
        for name in ("num_neighbors", "num_similar"):
            if getattr(self, name) is not None:
                raise UserError(
                    f"{name}={getattr(self, name)} has no effect in mode full, which reads every "
                    f"neighbour. Remove it, or set mode: sampled."
                )
        for name in ("cache_bytes", "sample_cache_bytes"):
            if getattr(self, name) != _CACHE_BYTES:
                raise UserError(
                    f"{name}={getattr(self, name)} has no effect in mode full, where there are no "
                    f"other ranks. Remove it, or set mode: sampled."
                )
        if self.num_ranks > 1:
            raise UserError(
                f"num_ranks={self.num_ranks} has no effect in mode full, which is one process. Set "
                f"num_ranks: 1, or mode: sampled."
            )

    def _check_neighbors(self) -> None:
        if self.edge_dropout:
            raise UserError(
                f"edge_dropout={self.edge_dropout} has no effect in mode sampled, where "
                f"num_neighbors leaves neighbours out. Remove it (where the recipe sets it: --set "
                f"align.edge_dropout=0), or set mode: full."
            )
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
