"""The folder of a run: who works in it, and what it is made from (runner -> disk)."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from alignrec import artifacts
from alignrec.errors import UserError
from launch import recipe as recipes
from launch.recipe import Recipe

_LOCK = ".lock"


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Hold the folder for the length of the block; the lock ends with the process, however it ends.

    Raises:
        UserError: another run holds it, or it cannot be made.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / _LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the run directory {run_dir} cannot be made ({error.strerror}). Choose another with "
            f"--run-dir."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise UserError(
                f"{run_dir} is in use by {_holder(file.read())}: two runs would overwrite each "
                f"other's artifacts. Wait for it, stop it, or choose another --run-dir."
            ) from None
        file.truncate(0)
        json.dump(
            {
                "pid": os.getpid(),
                "host": socket.gethostname(),
                "job": os.environ.get("ALIGNREC_JOB"),
                "since": _now(),
            },
            file,
        )
        file.flush()
        yield


def record(recipe: Recipe, run_dir: Path) -> None:
    """Write the resolved recipe, and by what and when it is run."""
    recipes.write(recipe, run_dir / "recipe.yaml")
    facts = {"command": sys.argv[1:], "started": _now(), **artifacts.producer()}
    artifacts.write_json(run_dir / "environment.json", facts)


def _holder(text: str) -> str:
    try:
        owner = json.loads(text)
        job = f" (job {owner['job']})" if owner["job"] else ""
        return f"process {owner['pid']} on {owner['host']}{job} since {owner['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
