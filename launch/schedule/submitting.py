"""Runs of schedules as jobs of a cluster (server -> launch.jobs)."""

import contextlib
from typing import Protocol

from cluster import environment
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
            RefusedError: it does not accept our token.
            StageFailure: the cluster failed.
            UserError: the recipe is wrong.
        """
        ...

    def find(self, schedule: Schedule, job_id: str) -> Job | None:
        """Return a job; None when the cluster has none of that id.

        Raises:
            NoAnswerError: the cluster cannot be reached.
            RefusedError: it does not accept our token.
            StageFailure: the cluster failed.
        """
        ...


class RayJobs:
    """Runs as Ray jobs; the recipe is read anew for each."""

    def submit(self, schedule: Schedule, job_id: str) -> None:
        """Submit a run, unless the cluster has it already."""
        with environment.changed(schedule.variables), contextlib.suppress(JobExistsError):
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
