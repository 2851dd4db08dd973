"""A schedule, a cluster and a clock that only tests move."""

import dataclasses
import datetime
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from alignrec.errors import UserError
from launch.jobs import Job
from launch.schedule import definition
from launch.schedule.definition import Schedule
from launch.schedule.serving import Server
from launch.schedule.store import Folder, State, stamp

START = datetime.datetime(2026, 1, 10, 0, 30, tzinfo=datetime.UTC)


class Killed(BaseException):
    """The server's process is gone, at this very effect."""


class Cluster:
    """Jobs that end when a test says so; a second job of the same id is never made."""

    def __init__(self) -> None:
        self.jobs: dict[str, Job] = {}
        self.trouble: Exception | None = None
        self.mistake: UserError | None = None
        self.strict = False
        self.submissions = Counter[str]()

    def submit(self, schedule: Schedule, job_id: str) -> None:
        for error in (self.mistake, self.trouble):  # the recipe is read before the cluster is asked
            if error is not None:
                raise error
        if self.strict and job_id in self.jobs:
            pytest.fail(f"{job_id} was submitted twice")
        if job_id not in self.jobs:
            self.submissions[job_id] += 1
            self.jobs[job_id] = Job(job_id, "running", "", None, None, "", None)

    def find(self, schedule: Schedule, job_id: str) -> Job | None:
        if self.trouble is not None:
            raise self.trouble
        return self.jobs.get(job_id)

    def end(self, status: str = "succeeded", exit_code: int | None = 0) -> None:
        """End every job that runs."""
        for job in self.jobs.values():
            if not job.is_over:
                self.jobs[job.id] = dataclasses.replace(
                    job, status=status, exit_code=exit_code, message="so said the cluster"
                )


class World:
    """A folder with one schedule, a cluster, and a clock that only tests move."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.now = START
        self.folder = Folder(path)
        self.cluster = Cluster()
        self.lines: list[str] = []
        self.schedule = definition.build(
            {
                "name": "hourly",
                "cron": "0 * * * *",
                "recipe": "demo",
                "run_dir": "/runs",
                "directory": "/",
                "mark": "ab",
                "added": stamp(START),
                **options,
            }
        )
        self.folder.write(self.schedule)
        self.restart()

    def restart(self) -> None:
        self.server = Server(
            self.folder, self.cluster, clock=lambda: self.now, show=self.lines.append
        )

    def at(self, hour: int, minute: int = 0, second: int = 0) -> None:
        """Move the clock and look."""
        self.now = START.replace(hour=hour, minute=minute, second=second)
        self.server.look()

    @property
    def history(self) -> list[tuple[str, str]]:
        return [(entry.time[11:16], entry.outcome) for entry in self.folder.history("hourly")]

    @property
    def state(self) -> State:
        return self.folder.state(self.schedule)

    @property
    def submitted(self) -> list[str]:
        return [
            job.removeprefix("hourly-20260110-").removesuffix("-ab") for job in self.cluster.jobs
        ]
