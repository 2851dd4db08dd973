"""What every stage is: a name, a configuration, input artifacts, one output, a function per rank.

``launch`` runs stages by these descriptions on a Ray cluster; ``python -m alignrec.<stage>`` runs
one of them in this process, or on several ranks under torchrun.
"""

import argparse
import contextlib
import dataclasses
import errno
import importlib
import json
import os
import sys
import time
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from alignrec import artifacts, configuration
from alignrec.artifacts import Manifest
from alignrec.errors import StageFailure, UserError

# An input is named by its kind, but for a second artifact of the same kind.
INPUT_KINDS = {"ablation": "embeddings"}
Backend = Literal["nccl", "gloo"]
# Name of the fact, and in a fingerprint, of the artifact that a stage went on from.
EARLIER = "earlier"
_RECOVERY_SECONDS = 60
_STORAGE_FAULTS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """Description of a stage; importing it loads neither torch nor ray.

    Attributes:
        name: section of the recipe and folder of the artifact in the run directory.
        kind: kind of the artifact that it writes.
        config: "module:class" of its configuration dataclass.
        run: "module:function" of its work, called once per rank with (config, context).
        inputs: artifacts that it must have, named by kind (see INPUT_KINDS).
        optional_inputs: artifacts that it uses where the recipe makes them.
        version: raised whenever the code would compute something else from the same settings.
        inherits: section whose settings this one starts from (an ablation varies another stage).
        driver: the work runs in the process that launches it, because it is a driver of Ray itself.
        backend: how ranks that have GPUs talk; gloo where what they send lies in host memory, or
            where several of them may share a GPU. Ranks without GPUs talk through gloo.
    """

    name: str
    kind: str
    config: str
    run: str
    inputs: tuple[str, ...] = ()
    optional_inputs: tuple[str, ...] = ()
    version: int = 1
    inherits: str | None = None
    driver: bool = False
    backend: Backend = "nccl"

    def load_config(self, section: Mapping[str, Any] | None) -> Any:  # noqa: ANN401
        """Build the stage's configuration from its section of a recipe."""
        return configuration.build(_load(self.config), section, section=self.name)

    def section(self, sections: Mapping[str, Any]) -> Any:  # noqa: ANN401 - checked by build
        """Return the stage's section of a recipe, over the one that it inherits from."""
        own = sections.get(self.name)
        inherited = sections.get(self.inherits) if self.inherits else None
        if not isinstance(inherited, Mapping) or not isinstance(own, (Mapping, type(None))):
            return own
        return {**inherited, **(own or {})}

    def check_section(self, assignment: str) -> None:
        """Refuse a ``--set`` that this stage would not see.

        Raises:
            UserError: its section is another one.
        """
        section = assignment.partition(".")[0]
        if section not in (self.name, self.inherits):
            raise UserError(
                f"--set {assignment!r} sets something in section {section}, which stage "
                f"{self.name} does not read. Write {self.name}.{assignment.partition('.')[2]}."
            )

    def load_run(self) -> Callable[[Any, "Context"], None]:
        """Import the stage's work (this may load torch, ray and other engines)."""
        function: Callable[[Any, Context], None] = _load(self.run)
        return function

    def uses_gpu(self, config: Any) -> bool:  # noqa: ANN401 - the stage's own
        """Return whether its ranks compute on GPUs where there are any."""
        return config.uses_gpu if isinstance(config, ChoosesDevice) else True

    def fingerprint(
        self,
        config: Any,  # noqa: ANN401 - the stage's own
        inputs: Mapping[str, Path],
        output: Path | None = None,
    ) -> str:
        """Return what a finished artifact must carry to be reused.

        A configuration with ``source_identity() -> str`` adds the state of what it reads from
        outside of the artifacts, such as a raw catalogue. One with ``earlier() -> Manifest | None``
        adds the identity of the artifact that it goes on from. The stage may put its result in that
        one's place: then the result is what was asked for, and what it went on from counts.

        Args:
            config: the stage's configuration.
            inputs: kind -> finished artifact folder.
            output: where the stage writes; needed where a configuration goes on from an artifact.
        """
        identities = {name: artifacts.read(path).identity for name, path in inputs.items()}
        if isinstance(config, ReadsSources):
            identities["sources"] = config.source_identity()
        settings = configuration.result_settings(config)

        def made_from(earlier: Mapping[str, str]) -> str:
            return artifacts.fingerprint(
                self.name, self.version, settings, {**identities, **earlier}
            )

        earlier = config.earlier() if isinstance(config, GoesOn) else None
        if earlier is None:
            return made_from({})
        if output is not None and output.resolve() == config.goes_on_from.resolve():
            before = earlier.facts.get(EARLIER)
            finished = made_from({EARLIER: before["identity"]} if before else {})
            if finished == earlier.fingerprint:
                return finished
        return made_from({EARLIER: earlier.identity})


@typing.runtime_checkable
class ReadsSources(Protocol):
    """A configuration that names data outside of the artifacts."""

    def source_identity(self) -> str:
        """Return a digest of what is there now (paths, sizes, times or checksums)."""
        ...


@typing.runtime_checkable
class ChoosesDevice(Protocol):
    """A configuration that says whether the stage computes on GPUs."""

    @property
    def uses_gpu(self) -> bool:
        """Return whether a GPU would be of use."""
        ...


@typing.runtime_checkable
class GoesOn(Protocol):
    """A configuration that names an artifact of the same kind to go on from.

    What was gone on from is kept in the result's facts, under ``EARLIER``, with its "identity".
    """

    @property
    def goes_on_from(self) -> Path | None:
        """Return its folder; None where none is named."""
        ...

    def earlier(self) -> Manifest | None:
        """Return its manifest; None where the work starts from nothing."""
        ...


def earlier_manifest(
    folder: Path | None, kind: str, *, optional: bool, setting: str
) -> Manifest | None:
    """Return the manifest of an artifact to go on from; None where there is none yet.

    Args:
        folder: as it is named in the configuration.
        kind: of artifact.
        optional: whether it may be absent, as before the first run.
        setting: that names the folder, for the message.

    Raises:
        UserError: it is not optional and not there, or of another kind.
        StageFailure: it is being replaced by another run.
    """
    if folder is None:
        return None
    if artifacts.is_being_placed(folder):
        raise StageFailure(
            f"{setting}={folder} is being replaced, so it cannot be read now. Run again when the "
            f"run that writes it has ended; if that was killed, repeat it first."
        )
    if optional and not (folder / artifacts.MANIFEST).exists():
        return None
    return artifacts.read(folder, kind)


@dataclasses.dataclass(frozen=True)
class Context:
    """Where one rank of a stage reads and writes.

    Attributes:
        inputs: artifact kind -> finished artifact folder.
        output: folder that the stage writes (through ``artifacts.open_draft`` and ``publish``).
        fingerprint: what the output will carry.
        log_dir: folder of JSON lines and TensorBoard files, kept when the stage is run again.
    """

    inputs: Mapping[str, Path]
    output: Path
    fingerprint: str
    log_dir: Path


def main(stage: Stage, arguments: Sequence[str] | None = None) -> int:
    """Run one stage from the command line, on this rank.

    Returns:
        0 done, 1 the work failed, 2 the user's mistake.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m {stage.config.partition(':')[0].rpartition('.')[0]}",
        description=f"Stage {stage.name}: {', '.join(stage.inputs) or 'raw data'} -> {stage.kind}.",
    )
    for kind in (*stage.inputs, *stage.optional_inputs):
        parser.add_argument(
            f"--{kind}", type=Path, required=kind in stage.inputs, help=f"folder of the {kind}"
        )
    parser.add_argument(
        "--output", type=Path, required=True, help=f"folder of the new {stage.kind}"
    )
    parser.add_argument("--recipe", type=Path, help=f"YAML file; its section {stage.name} is used")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument(
        "--json", action="store_true", help="tell the outcome as JSON in the last line of stdout"
    )
    options = parser.parse_args(arguments)
    # Spinning threads starve each other where ranks share cores; torch reads this when it loads.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def work() -> None:
        tree = configuration.load_yaml(options.recipe) if options.recipe else {}
        tree = configuration.apply_assignments(tree, options.set)
        tree = configuration.expand_variables(tree)
        for assignment in options.set:
            stage.check_section(assignment)
        config = stage.load_config(stage.section(tree))
        inputs = {
            kind: getattr(options, kind)
            for kind in (*stage.inputs, *stage.optional_inputs)
            if getattr(options, kind) is not None
        }
        for name, path in inputs.items():
            artifacts.read(path, INPUT_KINDS.get(name, name))
        output = options.output
        _recover(output)
        context = Context(
            inputs=inputs,
            output=output,
            fingerprint=stage.fingerprint(config, inputs, output),
            log_dir=output.with_name(output.name + ".logs"),
        )
        if isinstance(config, GoesOn) and config.goes_on_from is not None:
            # Its result may lie where it would go on from, so that it cannot be made again.
            manifest = artifacts.finished(output)
            if manifest is not None and manifest.fingerprint == context.fingerprint:
                if _is_first_rank():
                    print(f"[{stage.name}] {output} is finished already", flush=True)
                return
        with storage_failures(output):
            stage.load_run()(config, context)

    start = time.monotonic()
    outcome = attempt(work)
    if options.json and _is_first_rank():
        seconds = time.monotonic() - start
        print(json.dumps(summary(outcome, options.output, seconds=seconds)), flush=True)
    if outcome.fault is not None:
        raise outcome.fault
    return outcome.exit_code


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"


def _recover(output: Path) -> None:
    """Finish what a killed run left: rank 0 renames, the others wait until it is in its place."""
    if _is_first_rank():
        artifacts.recover(output)
        return
    deadline = time.monotonic() + _RECOVERY_SECONDS
    while (artifacts.partial_path(output) / artifacts.MANIFEST).exists():
        if time.monotonic() > deadline:
            raise StageFailure(
                f"rank 0 did not move {artifacts.partial_path(output)} to its place within "
                f"{_RECOVERY_SECONDS} s. Look at its output, and run the same command again."
            )
        time.sleep(0.1)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a command ended.

    Attributes:
        state: done, failed, mistake (the user's) or interrupted.
        exit_code: 0, 1, 2 or 130.
        error: the line that was printed on stderr; empty when done.
        fault: what nobody foresaw, for its traceback.
    """

    state: Literal["done", "failed", "mistake", "interrupted"]
    exit_code: int
    error: str = ""
    fault: Exception | None = None


def summary(outcome: Outcome, output: Path, *, seconds: float) -> dict[str, Any]:
    """Return what a scheduler wants to know of a finished stage, as plain JSON values.

    Args:
        outcome: how it ended.
        output: its artifact; its counts are told when the stage is done.
        seconds: how long it ran.
    """
    told: dict[str, Any] = {
        "state": outcome.state,
        "exit_code": outcome.exit_code,
        "output": str(output),
        "version": None,
        "counts": {},
        "seconds": round(seconds, 3),
        "quarantined": {},
        "error": outcome.error,
    }
    if outcome.state == "done":
        manifest = artifacts.read(output)
        told["counts"] = manifest.counts
        told["quarantined"] = manifest.facts.get("quarantine", {})
        if output.is_symlink():
            told["version"] = output.resolve().name
    return told


def exit_code(work: Callable[[], None]) -> int:
    """Run ``work`` and turn the two reportable failures into a line on stderr and an exit code."""
    outcome = attempt(work)
    if outcome.fault is not None:
        raise outcome.fault
    return outcome.exit_code


def attempt(work: Callable[[], None]) -> Outcome:
    """Run ``work`` and say how it ended; a reportable failure is a line on stderr."""
    try:
        work()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return Outcome("mistake", 2, str(error))
    except StageFailure as error:
        print(f"failed: {error}", file=sys.stderr)
        return Outcome("failed", 1, str(error))
    except KeyboardInterrupt:
        line = "interrupted; run the same command again to resume"
        print(line, file=sys.stderr)
        return Outcome("interrupted", 130, line)
    except Exception as error:
        return Outcome("failed", 1, f"{type(error).__name__}: {error}", fault=error)
    return Outcome("done", 0)


@contextlib.contextmanager
def storage_failures(output: Path) -> Iterator[None]:
    """Turn an error of a storage that takes no more into a failure that names the place.

    Args:
        output: what is being written, for errors that name no file.

    Raises:
        StageFailure: the storage is full, over its quota or read-only.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _STORAGE_FAULTS:
            raise
        raise StageFailure(
            f"{error.filename or output} cannot be written ({os.strerror(error.errno)}), so the "
            f"stage stopped. Make room, and run the same command again: it resumes."
        ) from error


def _load(target: str) -> Any:  # noqa: ANN401 - a class or a function
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)
