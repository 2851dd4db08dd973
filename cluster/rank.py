"""One rank of a stage, in the process that Ray started for it (worker group -> stage)."""

import contextlib
import dataclasses
import faulthandler
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context, Stage, storage_failures

_STDOUT, _STDERR = 1, 2


class RankCrash(StageFailure):
    """An exception that the stage did not expect; often the echo of another rank's failure."""


@dataclasses.dataclass(frozen=True)
class RankJob:
    """The same for every rank of a stage.

    Attributes:
        stage: which stage.
        config: its configuration.
        context: its folders.
        directory: folder that relative paths start from.
    """

    stage: Stage
    config: Any
    context: Context
    directory: Path

    def log(self, index: int) -> Path:
        """Return the file that takes all output of a rank (of any rank where it is negative)."""
        return self.context.log_dir / (f"rank_{index}.log" if index >= 0 else "rank_*.log")


def run_rank(job: RankJob) -> None:
    """Do this rank's part of the stage, with its output in the rank's log.

    Raises:
        UserError: as the stage raised it.
        StageFailure: as the stage raised it, for a storage that takes no more, or a RankCrash for
            everything else.
    """
    index = int(os.environ.get("RANK", "0"))
    log = job.log(index)
    directory = Path(os.environ.get("ALIGNREC_DIRECTORY") or job.directory)
    if directory.is_dir():
        os.chdir(directory)
    with _output_in(log):
        try:
            with storage_failures(job.context.output):
                job.stage.load_run()(job.config, job.context)
        except (UserError, StageFailure) as error:
            traceback.print_exc()
            raise type(error)(str(error)) from None  # without what may not travel between hosts
        except Exception as error:
            traceback.print_exc()
            raise RankCrash(
                f"{job.stage.name}: rank {index} failed with {describe(error)}. Its output is in "
                f"{log}"
            ) from None


def describe(error: BaseException) -> str:
    """Return an exception as one short line."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    text = lines[0].strip().rstrip(".") if lines else ""
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


@contextlib.contextmanager
def _output_in(log: Path) -> Iterator[None]:
    """Send everything that this process prints, C++ libraries included, to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        kept = [(number, os.dup(number)) for number in (_STDOUT, _STDERR)]
        for number, _ in kept:
            os.dup2(file.fileno(), number)
        faulthandler.enable(file)
        try:
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            faulthandler.disable()
            for number, copy in kept:
                os.dup2(copy, number)
                os.close(copy)
