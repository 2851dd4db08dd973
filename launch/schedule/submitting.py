"""Runs of schedules as jobs of a cluster (server -> launch.jobs)."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from typing import Protocol

from launch import recipe as recipes
from launch import runner
from launch.jobs import Job, JobExistsError, Jobs, UnknownJobError
from launch.schedule.definition import Schedule


class Cluster(Protocol):
    """Where runs are submitted."""

    def submit(self, schedule: Schedule, job_id: str) -> None:
        """Submit a run, unless the cluster has it already.

        Raises:
            NoAnswerError: the cluster cannot be reached; perhaps it has the job nevertheless.
            StageFailure: the cluster failed.
            UserError: the recipe is wrong, or the cluster refuses us.
        """
        ...

    def find(self, schedule: Schedule, job_id: str) -> Job | None:
        """Return a job; None when the cluster has none of that id.

        Raises:
            NoAnswerError: the cluster cannot be reached.
            StageFailure: the cluster failed.
            UserError: the cluster refuses us.
        """
        ...


class RayJobs:
    """Runs as Ray jobs; the recipe is read anew for each."""

    def submit(self, schedule: Schedule, job_id: str) -> None:
        """Submit a run, unless the cluster has it already."""
        with _set(schedule.variables), contextlib.suppress(JobExistsError):
            recipe = recipes.load(schedule.recipe, schedule.assignments)
            runner.chosen_steps(recipe, schedule.selection)
            Jobs(schedule.address).submit(
                recipe,
                schedule.run_dir,
                schedule.selection.options,
                job_id=job_id,
                directory=schedule.directory,
            )

    def find(self, schedule: Schedule, job_id: str) -> Job | None:
        """Return a job; None when the cluster has none of that id."""
        try:
            return Jobs(schedule.address).get(job_id)
        except UnknownJobError:
            return None


@contextlib.contextmanager
def _set(variables: Mapping[str, str]) -> Iterator[None]:
    """Have environment variables for the length of the block."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
