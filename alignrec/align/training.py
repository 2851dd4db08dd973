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
from alignrec.align.position import Position, StepCounter
from alignrec.align.sampled import SampledTrainer
from alignrec.align.schedule import learning_rate
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
        """Take the steps of an epoch; yield the loss terms of each, none for an empty batch.

        They stay on the device that computed them and carry no gradient.
        """
        ...

    def evaluate(self) -> dict[str, float]:
        """Return validation metrics by name, the same on every rank."""
        ...

    def traffic(self) -> dict[str, float]:
        """Return what sampling has asked of other ranks since the last call, for the log."""
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


def run(config: AlignConfig, context: Context) -> None:
    """Train on this rank; rank 0 writes the embeddings artifact.

    Raises:
        UserError: artifacts that do not belong together, or a number of ranks that does not fit.
    """
    with process_group(
        timeout_seconds=config.timeout_seconds, backend=STAGE.backend, uses_gpu=config.uses_gpu
    ) as rank:
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
    counter, note = StepCounter(position), f"epoch {position.epoch}"
    total = config.epochs * trainer.num_triples
    per_step = trainer.num_triples / trainer.num_steps
    done = round(_steps_done(trainer, position) * per_step)
    with telemetry.progress(total, "triples", done=done) as progress:
        while position.epoch < config.epochs and position.selection.stale < config.patience:
            counter.start()
            for terms in trainer.steps(position.epoch, position.step):
                beat()
                counter.count(terms)
                progress.update(round(per_step), note=note)
                left = trainer.num_steps - position.step
                if position.step % config.log_steps == 0 and left >= config.log_steps:
                    note = _log_steps(config, trainer, counter, telemetry)
                if _steps_done(trainer, position) % config.checkpoint_steps == 0:
                    _save(trainer, checkpoints, counter)
            note = _finish_epoch(config, trainer, counter, telemetry)
            progress.update(0, note=note)
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
    finished = position.step == trainer.num_steps
    telemetry.rewind(_steps_done(trainer, position) - finished, keep_start=True)
    telemetry.say(f"resuming at epoch {position.epoch}, step {position.step}")
    return position


def _steps_done(trainer: Trainer, position: Position) -> int:
    """Return the optimizer steps since the run began."""
    return position.epoch * trainer.num_steps + position.step


def _save(trainer: Trainer, checkpoints: Path, counter: StepCounter) -> None:
    state = dataclasses.asdict(counter.settle())
    trainer.save(checkpoints, _steps_done(trainer, counter.position), state)


def _judge_start(trainer: Trainer, position: Position, telemetry: Telemetry) -> None:
    """Evaluate what training goes on from: its first steps may well lose something."""
    with _timed(position, "evaluate_seconds"):
        metrics = trainer.evaluate()
    position.selection.offer(metrics, by=SELECTION_METRIC, epoch=-1)
    trainer.keep_best()
    found = {f"valid/{name}": value for name, value in metrics.items()}
    telemetry.log({"epoch": -1, **found}, step=0)
    telemetry.say(f"begins at valid {SELECTION_METRIC} {metrics[SELECTION_METRIC]:.4f}")


def _log_steps(
    config: AlignConfig, trainer: Trainer, counter: StepCounter, telemetry: Telemetry
) -> str:
    """Log steps within an epoch; return the note for the progress."""
    row = _row(config, trainer, counter)
    telemetry.log(row, step=_steps_done(trainer, counter.position))
    return _note(counter.position, row)


def _finish_epoch(
    config: AlignConfig, trainer: Trainer, counter: StepCounter, telemetry: Telemetry
) -> str:
    """Evaluate where it is due, log the end of the epoch and go on to the next; return the note."""
    position = counter.position
    row = _row(config, trainer, counter)
    last = position.epoch + 1 == config.epochs
    if last or (position.epoch + 1) % config.evaluate_every == 0:
        with _timed(position, "evaluate_seconds"):
            metrics = trainer.evaluate()
        if position.selection.offer(metrics, by=SELECTION_METRIC, epoch=position.epoch):
            trainer.keep_best()
        row |= {f"valid/{name}": value for name, value in metrics.items()}
    note = _note(position, row)
    position.epoch, position.step = position.epoch + 1, 0
    telemetry.log(row, step=_steps_done(trainer, position))
    return note


def _row(config: AlignConfig, trainer: Trainer, counter: StepCounter) -> dict[str, float]:
    """Return what the steps since the last row have shown; collective."""
    position, stretch = counter.position, counter.take()
    num_triples = stretch.steps * trainer.num_triples / trainer.num_steps
    return {
        **stretch.losses(),
        "learning_rate": learning_rate(config, position.epoch),
        # The number of an epoch stands for its end, so -1 for the start of the first.
        "epoch": position.epoch - 1 + position.step / trainer.num_steps,
        **trainer.traffic(),
        "triples_per_second": num_triples / max(stretch.seconds, 1e-9),
    }


def _note(position: Position, row: Mapping[str, float]) -> str:
    parts = [f"epoch {position.epoch}"]
    if "loss/bpr" in row:
        parts.append(f"bpr {row['loss/bpr']:.4f}")
    if (best := position.selection.metrics.get(SELECTION_METRIC)) is not None:
        parts.append(f"best valid {SELECTION_METRIC} {best:.4f}")
    return ", ".join(parts)


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
