"""The folder of a run: who works in it, and what it is made from (runner -> disk)."""

import contextlib
import datetime
import sys
from collections.abc import Iterator
from pathlib import Path

from alignrec import artifacts
from alignrec.errors import UserError
from launch import lock
from launch import recipe as recipes
from launch.recipe import Recipe

_LOCK = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for the length of the block; the lock ends with the process, however it ends.

    Raises:
        StageFailure: another run holds it.
        UserError: it cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / _LOCK).touch()
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be made ({error.strerror}). Choose another with "
            f"--run-dir."
        ) from error

    def refusal(holder: str) -> str:
        return (
            f"{run_dir} is in use by {holder}: two runs would overwrite each other's artifacts. "
            f"Wait for it, stop it, or choose another --run-dir."
        )

    with lock.held(run_dir / _LOCK, refusal=refusal):
        yield


def record(recipe: Recipe, run_dir: Path) -> None:
    """Write the resolved recipe, and by what and when it is run."""
    recipes.write(recipe, run_dir / "recipe.yaml")
    facts = {"command": sys.argv[1:], "started": _now(), **artifacts.producer()}
    artifacts.write_json(run_dir / "environment.json", facts)


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
