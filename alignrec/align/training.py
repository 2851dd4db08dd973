"""The align stage: train until validation stops improving, write the best epoch's embeddings."""

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from alignrec import artifacts, checkpoint
from alignrec.align import ABLATION, STAGE, catalogue
from alignrec.align.config import AblationConfig, AlignConfig
from alignrec.align.full_graph import FullGraphTrainer
from alignrec.align.initial import (
    CATALOGUE,
    CONTENT,
    HELD_OUT,
    Earlier,
    content_source,
    held_out_settings,
    leaks,
)
from alignrec.align.inputs import Inputs
from alignrec.align.sampled import SampledTrainer
from alignrec.align.schedule import Selection, learning_rate
from alignrec.align.validation import SELECTION_METRIC
from alignrec.artifacts import Draft
from alignrec.checkpoint import Checkpoint
from alignrec.configuration import to_mapping
from alignrec.distributed.host_memory import freed_memory_kept
from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.distributed.watchdog import Beat, Watchdog
from alignrec.errors import StageFailure, UserError
from alignrec.stage import EARLIER, Context
from alignrec.telemetry import HISTORY, Telemetry

_CHECKPOINTS = "checkpoints"


class Trainer(Protocol):
    """One mode of training; every rank calls the same methods in the same order.

    Attributes:
        num_steps: optimizer steps in an epoch.
        num_triples: training interactions over all ranks.
        num_judged: users that an evaluation ranks items for, over all ranks.
    """

    num_steps: int
    num_triples: int
    num_judged: int

    def steps(self, epoch: int, first_step: int) -> Iterator[Mapping[str, Tensor]]:
        """Take the steps of an epoch; yield the loss terms of each, none for an empty batch."""
        ...

    def evaluate(self) -> dict[str, float]:
        """Return validation metrics by name, the same on every rank."""
        ...

    def traffic(self) -> dict[str, float]:
        """Return what sampling on this rank asked of others since the last call, for the log."""
        ...

    def keep_best(self) -> None:
        """Remember the parameters as they are now."""
        ...

    def save(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint of parameters, optimizer, best parameters and ``state``."""
        ...

    def restore(self, saved: Checkpoint) -> dict[str, Any]:
        """Continue from a checkpoint; return its ``state``."""
        ...

    def write_best(self, draft: Draft) -> None:
        """Write ``model.safetensors`` and ``embeddings.safetensors`` of the best parameters."""
        ...


@dataclasses.dataclass
class Position:
    """How far training is.

    Attributes:
        epoch: epoch in progress.
        step: steps of that epoch that are done.
        selection: evaluations so far.
        sums: loss terms, summed over the epoch so far.
        train_seconds: time in steps.
        evaluate_seconds: time in evaluations.
    """

    epoch: int = 0
    step: int = 0
    selection: Selection = dataclasses.field(default_factory=Selection)
    sums: dict[str, float] = dataclasses.field(default_factory=dict)
    train_seconds: float = 0.0
    evaluate_seconds: float = 0.0

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Position":
        """Return what ``dataclasses.asdict`` made JSON of."""
        return cls(**{**state, "selection": Selection(**state["selection"])})


def run(config: AlignConfig, context: Context) -> None:
    """Train on this rank; rank 0 writes the embeddings artifact.

    Raises:
        UserError: artifacts that do not belong together, or a number of ranks that does not fit.
    """
    with process_group(timeout_seconds=config.timeout_seconds) as rank:
        _check_ranks(config, rank)
        inputs = Inputs.open(context.inputs)
        _check_graph(config, inputs)
        earlier = Earlier.open(config, inputs)
        _check_unchanged(config, context)
        if rank.is_first:
            if earlier is not None:
                _check_earlier(earlier, inputs, context)
            artifacts.open_draft(context.output, fingerprint=context.fingerprint)
        barrier(rank)
        draft = Draft(artifacts.partial_path(context.output))
        with (
            freed_memory_kept(),
            Telemetry(context.log_dir, context.log_dir.stem, enabled=rank.is_first) as telemetry,
            Watchdog(
                rank, context.log_dir, seconds=config.watchdog_seconds, doing="aligning"
            ) as watchdog,
        ):
            _announce(earlier, inputs, telemetry)
            actual, work = config.going_on() if earlier else config, draft.work
            trainer = _make_trainer(actual, inputs, rank, work, earlier, watchdog)
            checkpoints, goes_on = work / _CHECKPOINTS, earlier is not None
            position = _fit(
                actual,
                trainer,
                checkpoints,
                telemetry,
                watchdog.beat,
                rank=rank,
                goes_on=goes_on,
            )
            trainer.write_best(draft)
    # After the group is left: checksums of large tables may take longer than its timeout.
    if rank.is_first:
        shutil.copyfile(context.log_dir / HISTORY, draft.path / HISTORY)
        _describe(draft, inputs, config, position, earlier)
        artifacts.publish(
            draft,
            context.output,
            kind="embeddings",
            fingerprint=context.fingerprint,
            config=to_mapping(config),
            inputs=context.inputs,
        )


def _check_ranks(config: AlignConfig, rank: Rank) -> None:
    if config.mode == "full" and rank.world_size > 1:
        raise UserError(
            f"mode full is one process, but {rank.world_size} ranks were started: all would "
            f"train the same. Start one, or set align.mode=sampled."
        )
    if config.num_ranks > rank.world_size == 1:
        raise UserError(
            f"num_ranks={config.num_ranks}, but this process was started alone and would train "
            f"on one rank. Start it with torchrun --nproc-per-node {config.num_ranks} -m "
            f"alignrec.align, or run the recipe with python -m launch run."
        )


def _check_graph(config: AlignConfig, inputs: Inputs) -> None:
    """Refuse an item-item graph that is not the one that the method's variant reads."""
    built = bool(artifacts.read(inputs.graph, "graph").config.get("paper_compatible", False))
    if config.content and built != config.paper_compatible:
        raise UserError(
            f"paper_compatible={config.paper_compatible}, but {inputs.graph} was built with "
            f"paper_compatible={built}: the result would be neither the corrected method nor the "
            f"released code. Set align.paper_compatible and graph.paper_compatible alike."
        )


def _check_unchanged(config: AlignConfig, context: Context) -> None:
    """Refuse to go on from something else than what the fingerprint counts, on every rank."""
    if config.goes_on_from is None:
        return
    stage = ABLATION if isinstance(config, AblationConfig) else STAGE
    if stage.fingerprint(config, context.inputs, context.output) != context.fingerprint:
        raise StageFailure(
            f"initial.embeddings={config.goes_on_from} or an input was replaced since this run was "
            f"started, so it would go on from something else. Run the same command again."
        )


def _check_earlier(earlier: Earlier, inputs: Inputs, context: Context) -> None:
    """Check what rank 0 alone looks at, before the first checkpoint is written."""
    if earlier.manifest.fingerprint == context.fingerprint:
        raise UserError(
            f"initial.embeddings={earlier.path.parent} is what these settings and inputs lead to, "
            f"and what it went on from is gone, so it cannot be made again. Set "
            f"initial.embeddings to null to train from nothing."
        )
    earlier.check_catalogue(inputs.dataset)


def _announce(earlier: Earlier | None, inputs: Inputs, telemetry: Telemetry) -> None:
    if earlier is None:
        return
    telemetry.say(earlier.describe(inputs))
    found = leaks(earlier.manifest.facts.get(HELD_OUT), held_out_settings(inputs.dataset))
    if found:
        telemetry.say(
            f"warning: the earlier embeddings may have been trained on what is held out now, so "
            f"metrics may be too good: {'; '.join(found)}"
        )


def _make_trainer(
    config: AlignConfig,
    inputs: Inputs,
    rank: Rank,
    work: Path,
    earlier: Earlier | None,
    watchdog: Watchdog,
) -> Trainer:
    alive = watchdog.alive
    if config.mode == "full":
        return FullGraphTrainer(config, inputs, rank, earlier=earlier, alive=alive)
    return SampledTrainer(
        config, inputs, rank, work=work, earlier=earlier, beat=watchdog.beat, alive=alive
    )


def _fit(
    config: AlignConfig,
    trainer: Trainer,
    checkpoints: Path,
    telemetry: Telemetry,
    beat: Beat,
    *,
    rank: Rank,
    goes_on: bool,
) -> Position:
    _check_enough(trainer)
    position = _resume(trainer, checkpoints, telemetry, rank)
    if goes_on and position == Position():
        _judge_start(trainer, position, telemetry)
    done = position.epoch * trainer.num_steps + position.step
    per_step = trainer.num_triples / trainer.num_steps
    total = config.epochs * trainer.num_triples
    with telemetry.progress(total, "triples", done=round(done * per_step)) as progress:
        while position.epoch < config.epochs and position.selection.stale < config.patience:
            with _timed(position, "train_seconds"):
                for terms in trainer.steps(position.epoch, position.step):
                    beat()
                    _count_step(position, terms)
                    progress.update(round(per_step), note=_note(position))
                    step = position.epoch * trainer.num_steps + position.step
                    if step % config.checkpoint_steps == 0:
                        trainer.save(checkpoints, step, dataclasses.asdict(position))
            _finish_epoch(config, trainer, position, telemetry)
    return position


def _check_enough(trainer: Trainer) -> None:
    """Refuse data that training or its evaluations could not use, before the first step."""
    if trainer.num_triples == 0:
        raise UserError(
            "the dataset has no training interactions, so there is nothing to learn from. Prepare "
            "the dataset with a log."
        )
    if trainer.num_judged == 0:
        raise UserError(
            "no user has interactions in both train and valid: without validation there is no best "
            "epoch. Prepare the dataset with a validation split."
        )


def _resume(trainer: Trainer, checkpoints: Path, telemetry: Telemetry, rank: Rank) -> Position:
    saved = checkpoint.latest(checkpoints, rank=rank)
    if saved is None:
        telemetry.rewind(0)
        return Position()
    position = Position.from_state(trainer.restore(saved))
    # The row of a finished epoch is written after its last step, and again after this resume.
    telemetry.rewind(position.epoch * trainer.num_steps, keep_start=True)
    telemetry.say(f"resuming at epoch {position.epoch}, step {position.step}")
    return position


def _judge_start(trainer: Trainer, position: Position, telemetry: Telemetry) -> None:
    """Evaluate what training goes on from: its first steps may well lose something."""
    with _timed(position, "evaluate_seconds"):
        metrics = trainer.evaluate()
    position.selection.offer(metrics, by=SELECTION_METRIC, epoch=-1)
    trainer.keep_best()
    found = {f"valid/{name}": value for name, value in metrics.items()}
    telemetry.log({"epoch": -1, **found}, step=0)
    telemetry.say(f"begins at valid {SELECTION_METRIC} {metrics[SELECTION_METRIC]:.4f}")


def _count_step(position: Position, terms: Mapping[str, Tensor]) -> None:
    position.step += 1
    for name, term in terms.items():
        position.sums[name] = position.sums.get(name, 0.0) + float(term)


def _finish_epoch(
    config: AlignConfig, trainer: Trainer, position: Position, telemetry: Telemetry
) -> None:
    """Log the epoch that is complete, evaluate where it is due, and go on to the next epoch."""
    row = {f"loss/{name}": total / trainer.num_steps for name, total in position.sums.items()}
    row["learning_rate"] = learning_rate(config, position.epoch)
    row["epoch"] = position.epoch
    row |= trainer.traffic()
    last = position.epoch + 1 == config.epochs
    if last or (position.epoch + 1) % config.evaluate_every == 0:
        with _timed(position, "evaluate_seconds"):
            metrics = trainer.evaluate()
        if position.selection.offer(metrics, by=SELECTION_METRIC, epoch=position.epoch):
            trainer.keep_best()
        row |= {f"valid/{name}": value for name, value in metrics.items()}
    position.epoch, position.step, position.sums = position.epoch + 1, 0, {}
    seconds = position.train_seconds / position.epoch
    row["triples_per_second"] = trainer.num_triples / max(seconds, 1e-9)
    telemetry.log(row, step=position.epoch * trainer.num_steps)


def _note(position: Position) -> str:
    best = position.selection.metrics.get(SELECTION_METRIC)
    found = f", best valid {SELECTION_METRIC} {best:.4f}" if best is not None else ""
    bpr = position.sums.get("bpr", 0.0) / position.step
    return f"epoch {position.epoch}, bpr {bpr:.4f}{found}"


def _describe(
    draft: Draft,
    inputs: Inputs,
    config: AlignConfig,
    position: Position,
    earlier: Earlier | None,
) -> None:
    selection = position.selection
    draft.counts |= {
        "num_users": inputs.num_users,
        "num_items": inputs.num_items,
        "embedding_dim": config.embedding_dim,
    }
    draft.facts |= {
        "best_epoch": selection.epoch,
        "valid": selection.metrics,
        "epochs_run": position.epoch,
        "seconds_per_epoch": round(position.train_seconds / position.epoch, 4),
        "evaluation_seconds": round(position.evaluate_seconds, 2),
        "stopped_early": selection.stale >= config.patience,
        CATALOGUE: catalogue.digests(
            inputs.dataset, {"user": inputs.num_users, "item": inputs.num_items}
        ),
        CONTENT: content_source(inputs.features),
        HELD_OUT: held_out_settings(inputs.dataset),
    }
    if earlier is not None:
        draft.facts[EARLIER] = earlier.facts(inputs)


@contextlib.contextmanager
def _timed(position: Position, field: str) -> Iterator[None]:
    start = time.monotonic()
    try:
        yield
    finally:
        setattr(position, field, getattr(position, field) + time.monotonic() - start)
