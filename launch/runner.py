"""A run: which stages must run, in which order, and what came out (recipe -> artifacts)."""

import contextlib
import dataclasses
import datetime
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Protocol

from alignrec import artifacts
from alignrec.artifacts import Manifest
from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context
from cluster.config import ClusterConfig
from launch import run_directory
from launch.recipe import Recipe, Step

Show = Callable[[str], None]


class Engine(Protocol):
    """Where stages run; opened when the first one has to."""

    def connected(
        self, config: ClusterConfig, *, num_ranks: int
    ) -> contextlib.AbstractContextManager[str]:
        """Connect for the length of the block; yield a line that says to what."""
        ...

    def run(
        self,
        step: Step,
        context: Context,
        *,
        cluster: ClusterConfig,
        run: str,
        show: Show,
    ) -> None:
        """Run one stage on its ranks."""
        ...


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of one stage.

    Attributes:
        name: the stage.
        state: whether it ran or its finished artifact was reused.
        seconds: how long it ran; 0 when reused.
        path: its artifact.
        counts: the artifact's counts.
    """

    name: str
    state: Literal["ran", "reused"]
    seconds: float
    path: Path
    counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Selection:
    """Which part of the recipe is wanted.

    Attributes:
        first: stage that runs again even if it is finished; None to run what is stale.
        last: stage after which the run stops; None for the recipe's last.
    """

    first: str | None = None
    last: str | None = None

    @property
    def options(self) -> list[str]:
        """Return the options of ``launch run`` that select it."""
        chosen = (("--from", self.first), ("--until", self.last))
        return [word for name, stage in chosen if stage for word in (name, stage)]


def run(
    recipe: Recipe,
    run_dir: Path,
    *,
    engine: Engine,
    selection: Selection = Selection(),
    show: Show = print,
) -> list[Result]:
    """Run a recipe's stages, reusing every finished artifact that is still right.

    Raises:
        UserError: a mistake in the recipe, the data or the selection.
        StageFailure: a stage failed; the same command continues from there.
    """
    steps = chosen_steps(recipe, selection)
    with run_directory.locked(run_dir):
        _check_earlier(recipe, run_dir, selection)
        run_directory.record(recipe, run_dir)
        with contextlib.ExitStack() as stack:
            connect = _once(engine, recipe, stack, show)
            return [_do(step, recipe, run_dir, selection, engine, connect, show) for step in steps]


def _do(
    step: Step,
    recipe: Recipe,
    run_dir: Path,
    selection: Selection,
    engine: Engine,
    connect: Callable[[], None],
    show: Show,
) -> Result:
    output = run_dir / step.name
    inputs = {name: run_dir / provider for name, provider in step.inputs.items()}
    artifacts.recover(output)
    fingerprint = step.stage.fingerprint(step.config, inputs, output)
    manifest = artifacts.finished(output)
    if (
        manifest is not None
        and manifest.fingerprint == fingerprint
        and step.name != selection.first
    ):
        show(f"{step.name}: reused, finished {_ago(manifest.created)}")
        return Result(step.name, "reused", 0.0, output, manifest.counts)
    connect()
    show(f"{step.name}: {_reason(output, manifest, fingerprint)}{_ranks(step)}")
    context = Context(inputs, output, fingerprint, output.with_name(output.name + ".logs"))
    start = time.monotonic()
    engine.run(step, context, cluster=recipe.cluster, run=run_dir.name, show=show)
    seconds = time.monotonic() - start
    made = artifacts.read(output, step.stage.kind)
    if made.fingerprint != fingerprint:
        raise StageFailure(
            f"{step.name} ended without writing {output}. Its output is in {context.log_dir}"
        )
    show(f"{step.name}: done in {seconds:.1f} s")
    return Result(step.name, "ran", seconds, output, made.counts)


def chosen_steps(recipe: Recipe, selection: Selection) -> list[Step]:
    """Return the recipe's steps up to the last one that is wanted.

    Raises:
        UserError: the recipe has no such stage, or nothing would run.
    """
    steps = list(recipe.steps)
    if selection.last is not None:
        steps = steps[: steps.index(recipe.step(selection.last, "--until")) + 1]
    if selection.first is not None and recipe.step(selection.first, "--from") not in steps:
        raise UserError(
            f"--from {selection.first} comes after --until {selection.last}: nothing would run. "
            f"Exchange them."
        )
    return steps


def _check_earlier(recipe: Recipe, run_dir: Path, selection: Selection) -> None:
    """Refuse ``--from`` when what comes before is absent or not what the recipe says now."""
    if selection.first is None:
        return
    for step in recipe.steps:
        if step.name == selection.first:
            return
        output = run_dir / step.name
        artifacts.recover(output)
        try:
            manifest = artifacts.read(output, step.stage.kind)
        except UserError as error:
            raise UserError(
                f"--from {selection.first} needs the finished stage {step.name}, but {error} Run "
                f"without --from, or with --from {step.name}."
            ) from error
        inputs = {name: run_dir / provider for name, provider in step.inputs.items()}
        if manifest.fingerprint != step.stage.fingerprint(step.config, inputs, output):
            raise UserError(
                f"--from {selection.first}: stage {step.name} in {run_dir} was made from other "
                f"settings or inputs than the recipe has now. Run without --from, or with --from "
                f"{step.name}."
            )


def _once(
    engine: Engine, recipe: Recipe, stack: contextlib.ExitStack, show: Show
) -> Callable[[], None]:
    """Return a function that connects to Ray when it is first called."""
    done: list[str] = []

    def connect() -> None:
        if not done:
            most = max(step.num_ranks for step in recipe.steps)
            done.append(stack.enter_context(engine.connected(recipe.cluster, num_ranks=most)))
            show(f"engine: {done[0]}")

    return connect


def _reason(output: Path, manifest: Manifest | None, fingerprint: str) -> str:
    if _is_resumable(output, fingerprint):
        return "resuming where it was interrupted"
    if manifest is None:
        return "running"
    if manifest.fingerprint == fingerprint:
        return "running again, as asked"
    return "running again, its settings or inputs changed"


def _is_resumable(output: Path, fingerprint: str) -> bool:
    mark = artifacts.partial_path(output) / "fingerprint.json"
    try:
        return bool(json.loads(mark.read_text())["fingerprint"] == fingerprint)
    except (OSError, ValueError, KeyError):
        return False


def _ranks(step: Step) -> str:
    return f" ({step.num_ranks} ranks)" if step.num_ranks > 1 else ""


def _ago(created: str) -> str:
    age = datetime.datetime.now(datetime.UTC) - datetime.datetime.fromisoformat(created)
    seconds = max(int(age.total_seconds()), 0)
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or (unit != "days" and seconds >= size):
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"


class RayEngine:
    """Stages on the Ray cluster that is up, or on one of the run's own."""

    def connected(
        self, config: ClusterConfig, *, num_ranks: int
    ) -> contextlib.AbstractContextManager[str]:
        """Connect to Ray for the length of the block."""
        return self._connected(config, num_ranks)

    @contextlib.contextmanager
    def _connected(self, config: ClusterConfig, num_ranks: int) -> Iterator[str]:
        from cluster import engine

        with engine.connected(config, num_ranks=num_ranks) as name:
            yield name

    def run(
        self,
        step: Step,
        context: Context,
        *,
        cluster: ClusterConfig,
        run: str,
        show: Show,
    ) -> None:
        """Run a stage here when it drives Ray itself, else on its ranks in the cluster."""
        if step.stage.driver:
            os.environ["ALIGNREC_RUN"] = run  # a tag of its metrics, as on ranks
            step.stage.load_run()(step.config, context)
            return
        from cluster.worker_group import run_stage

        run_stage(
            step.stage,
            step.config,
            context,
            num_ranks=step.num_ranks,
            cluster=cluster,
            run=run,
            show=show,
        )
