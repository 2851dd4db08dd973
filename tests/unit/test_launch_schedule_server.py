"""The schedule server: each time once, whatever is killed; overlaps, deadlines, retries."""

import dataclasses
import datetime
import errno
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignrec.errors import StageFailure, UserError
from launch.jobs import Job, NoAnswerError, RefusedError
from launch.schedule import definition
from launch.schedule.definition import Schedule
from launch.schedule.serving import Server
from launch.schedule.store import Entry, Folder, State, stamp

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


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., World]:
    return lambda **options: World(tmp_path / "schedules", **options)


def test_each_time_runs_once_and_is_recorded(make: Callable[..., World]) -> None:
    world = make()
    world.at(0, 59)
    assert world.submitted == []
    world.at(1)
    world.at(1, 1)
    assert world.submitted == ["010000"]
    world.cluster.end()
    world.at(1, 2)
    assert world.history == [("01:00", "succeeded")]
    world.at(2)
    world.cluster.end("failed", 1)
    world.at(2, 1)
    assert world.history == [("01:00", "succeeded"), ("02:00", "failed")]
    last = world.folder.history("hourly")[-1]
    assert (last.exit_code, last.reason) == (1, "so said the cluster")
    assert world.submitted == ["010000", "020000"]


def test_of_several_missed_times_the_newest_runs(make: Callable[..., World]) -> None:
    world = make()
    world.at(5, 10)
    assert world.submitted == ["050000"]
    assert world.history == [("04:00", "skipped")]
    assert "missed, with 3 before it" in world.folder.history("hourly")[0].reason


def test_a_run_missed_by_more_than_the_deadline_is_skipped(make: Callable[..., World]) -> None:
    world = make(deadline=300)
    world.at(1, 5)
    assert world.submitted == ["010000"]
    world.cluster.end()
    world.at(2, 5, 1)
    assert world.submitted == ["010000"]
    assert world.history[-1] == ("02:00", "skipped")
    assert "301 s late, more than the 300 s" in world.lines[-1]


def test_a_run_over_its_time_makes_the_next_one_skip(make: Callable[..., World]) -> None:
    world = make()
    world.at(1)
    world.at(2)
    assert world.history == [("02:00", "skipped")]
    assert "hourly-20260110-010000-ab was not over" in world.folder.history("hourly")[0].reason
    world.cluster.end()
    world.at(3)
    assert world.submitted == ["010000", "030000"]


def test_or_wait_for_its_end(make: Callable[..., World]) -> None:
    world = make(on_overlap="queue")
    world.at(1)
    world.at(2)
    world.at(3)
    assert world.submitted == ["010000"]
    assert world.history == [("02:00", "skipped")]
    assert "a later time took its place" in world.folder.history("hourly")[0].reason
    world.cluster.end()
    world.at(3, 30)
    assert world.submitted == ["010000", "030000"]
    assert world.state.queued is None


def test_a_queued_run_has_a_deadline_too(make: Callable[..., World]) -> None:
    world = make(on_overlap="queue", deadline=600)
    world.at(1)
    world.at(2)
    world.cluster.end()
    world.at(2, 11)
    assert world.submitted == ["010000"]
    assert world.history == [("01:00", "succeeded"), ("02:00", "skipped")]


def test_a_failure_is_tried_again_later_and_later(make: Callable[..., World]) -> None:
    world = make(cron="0 1 * * *", retries=2, retry_wait=60)
    world.at(1)
    world.cluster.end("failed", 1)
    world.at(1, 0, 10)
    world.at(1, 1, 9)
    assert world.submitted == ["010000"]
    world.at(1, 1, 10)
    assert world.submitted == ["010000", "010000-ab-2"]
    world.cluster.end("failed", None)
    world.at(1, 2)
    world.at(1, 3, 59)
    assert len(world.submitted) == 2
    world.at(1, 4)
    world.cluster.end("failed", 1)
    world.at(1, 5)
    world.at(9)
    assert len(world.submitted) == 3
    entries = world.folder.history("hourly")
    assert [(entry.attempt, entry.outcome) for entry in entries] == [
        (1, "failed"),
        (2, "failed"),
        (3, "failed"),
    ]


@pytest.mark.parametrize(("status", "code"), [("failed", 2), ("stopped", None), ("succeeded", 0)])
def test_what_would_end_the_same_way_is_not_tried_again(
    status: str, code: int | None, make: Callable[..., World]
) -> None:
    world = make(cron="0 1 * * *", retries=2)
    world.at(1)
    world.cluster.end(status, code)
    world.at(1, 1)
    world.at(9)
    assert world.submitted == ["010000"]
    assert world.history == [("01:00", status)]


def test_a_job_lost_with_its_cluster_is_tried_again(make: Callable[..., World]) -> None:
    world = make(cron="0 1 * * *", retries=1, retry_wait=0)
    world.at(1)
    world.cluster.jobs.clear()
    world.at(1, 1)
    world.at(1, 2)
    assert world.history == [("01:00", "lost")]
    assert world.submitted == ["010000-ab-2"]


def test_a_recipe_that_broke_is_a_failed_run(make: Callable[..., World]) -> None:
    world = make(retries=3)
    world.cluster.mistake = UserError("align.sed is not a setting")
    world.at(1)
    world.at(1, 1)
    (entry,) = world.folder.history("hourly")
    assert (entry.outcome, entry.exit_code, entry.reason) == (
        "failed",
        2,
        str(world.cluster.mistake),
    )
    world.cluster.mistake = None
    world.at(2)
    assert world.submitted == ["020000"]


@pytest.mark.parametrize(
    "trouble",
    [NoAnswerError("nobody answers"), RefusedError("wrong token"), StageFailure("no agent")],
)
def test_a_cluster_that_is_down_gets_the_run_when_it_is_back(
    trouble: Exception, make: Callable[..., World]
) -> None:
    world = make()
    world.cluster.trouble = trouble
    for second in range(3):
        world.at(1, 0, second)
    assert len([line for line in world.lines if str(trouble) in line]) == 1
    assert world.state.active is not None
    assert world.state.active.trouble == str(trouble)
    world.cluster.trouble = None
    world.at(1, 30)
    assert world.submitted == ["010000"]
    assert world.state.active.trouble == ""


def test_a_cluster_that_is_down_too_long_gets_the_newest_run(make: Callable[..., World]) -> None:
    world = make()
    world.cluster.trouble = NoAnswerError("nobody answers")
    for hour in (1, 2, 3):
        world.at(hour)
    world.cluster.trouble = None
    world.at(3, 10)
    assert world.submitted == ["030000"]
    assert world.history == [("01:00", "skipped"), ("02:00", "skipped")]
    assert "nobody answers" in world.folder.history("hourly")[0].reason


def test_a_run_that_a_silent_cluster_took_is_followed(make: Callable[..., World]) -> None:
    world = make(deadline=60)
    world.cluster.submit(world.schedule, "hourly-20260110-010000-ab")  # the answer got lost
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(1)
    world.cluster.trouble = None
    world.at(1, 30)  # after the deadline
    world.cluster.end()
    world.at(1, 31)
    assert world.history == [("01:00", "succeeded")]
    assert world.cluster.submissions.total() == 1


def test_a_run_can_be_asked_for(make: Callable[..., World]) -> None:
    world = make()
    world.at(0, 40)
    world.folder.ask(world.schedule, world.now)
    world.at(0, 41)
    world.at(0, 42)
    assert world.submitted == ["004000"]
    assert world.folder.asked("hourly") is None
    world.folder.ask(world.schedule, world.now)
    world.at(0, 43)
    assert world.history == [("00:42", "skipped")]


def test_a_change_counts_from_its_time_on(make: Callable[..., World]) -> None:
    world = make()
    world.at(1)
    changed = dataclasses.replace(
        world.schedule, cron="*/15 * * * *", added=stamp(START.replace(hour=1, minute=20))
    )
    world.folder.write(changed)
    world.cluster.end()
    world.at(1, 21)
    assert world.submitted == ["010000"]
    assert world.history == [("01:00", "succeeded")]
    world.at(1, 30)
    assert world.submitted == ["010000", "013000"]


def test_a_removed_schedule_rests_and_a_damaged_one_does_not_stop_others(
    make: Callable[..., World],
) -> None:
    world = make()
    world.folder.write(dataclasses.replace(world.schedule, name="other"))
    (world.folder.path / "hourly.json").write_text("{")
    world.at(1)
    assert list(world.cluster.jobs) == ["other-20260110-010000-ab"]
    assert "is damaged" in world.lines[0]
    world.folder.remove("other")
    world.at(2)
    assert len(world.cluster.jobs) == 1


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("hourly.json", b"{"),
        ("hourly.json", b'{"name": "\xff"}'),
        ("hourly.history.jsonl", b'\xff\xfe\n{"time": 3}\n'),
        ("hourly.state.json", b'{"decided": "yesterday"}'),
        ("hourly.state.json", b'{"decided": "2026-01-10T00:00:00"}'),
        ("hourly.asked.json", b'{"time": "soon"}'),
        ("hourly.asked.json", b"[1]"),
    ],
)
def test_a_damaged_file_stops_no_other_schedule(
    file: str, content: bytes, make: Callable[..., World]
) -> None:
    world = make()
    world.folder.write(dataclasses.replace(world.schedule, name="other"))
    (world.folder.path / file).write_bytes(content)
    world.at(1)
    assert "other-20260110-010000-ab" in world.cluster.jobs
    world.cluster.end()
    world.at(1, 1)
    assert len(world.folder.history("other")) == 1
    if file != "hourly.json":  # what is left is enough
        assert world.history == [("01:00", "succeeded")]


def test_what_nobody_foresaw_stops_no_other_schedule(make: Callable[..., World]) -> None:
    world = make(name="first")
    world.folder.write(dataclasses.replace(world.schedule, name="second"))
    world.folder.remove("hourly")
    submit = world.cluster.submit

    def surprise(schedule: Schedule, job_id: str) -> None:
        if schedule.name == "first":
            raise KeyError("ray_version")
        submit(schedule, job_id)

    world.cluster.submit = surprise  # type: ignore[method-assign]
    world.at(1)
    world.at(1, 1)
    assert list(world.cluster.jobs) == ["second-20260110-010000-ab"]
    assert [line for line in world.lines if "first: KeyError: 'ray_version'" in line] == [
        world.lines[0]
    ]


def test_a_running_job_whose_recipe_broke_before_it_was_recorded_goes_on(
    make: Callable[..., World],
) -> None:
    world = make()
    world.cluster.trouble = NoAnswerError("the answer got lost")
    world.at(1)
    world.cluster.trouble = None
    world.cluster.submit(world.schedule, "hourly-20260110-010000-ab")
    world.cluster.mistake = UserError("align.sed is not a setting")
    world.at(1, 1)
    assert world.history == []
    assert world.state.active is not None
    assert world.state.active.phase == "running"


def test_retries_end_with_the_deadline(make: Callable[..., World]) -> None:
    world = make(cron="0 1 * * *", deadline=600, retries=3, retry_wait=60)
    world.at(1)
    world.cluster.end("failed", 1)
    world.at(1, 1)
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(1, 2)
    world.at(1, 5)
    world.cluster.trouble = None
    world.at(1, 10, 1)
    world.at(2)
    assert world.submitted == ["010000"]
    assert world.history == [("01:00", "failed")]
    assert "no further attempt" in world.lines[-1]
    assert "more than 600 s late" in world.lines[-1]


def test_what_is_lost_after_the_deadline_is_not_tried_again(make: Callable[..., World]) -> None:
    world = make(cron="0 1 * * *", deadline=600, retries=3)
    world.at(1)
    world.cluster.jobs.clear()
    world.at(1, 9, 30)  # the next attempt would begin after the deadline
    world.at(1, 9, 59)
    world.at(3)
    assert world.submitted == []
    assert world.history == [("01:00", "lost")]


@pytest.mark.parametrize("looks", [[(1, 50), (2, 0)], [(2, 0)], [(1, 50), (1, 55), (2, 0)]])
def test_a_retry_gives_way_to_a_newer_time(
    looks: list[tuple[int, int]], make: Callable[..., World]
) -> None:
    world = make(retries=3, retry_wait=1200)
    world.at(1)
    world.cluster.end("failed", 1)
    for look in looks:
        world.at(*look)
    assert world.submitted == ["010000", "020000"]
    assert world.history == [("01:00", "failed")]


def test_a_retry_gives_way_to_what_is_queued(make: Callable[..., World]) -> None:
    world = make(retries=3, on_overlap="queue")
    world.at(1)
    world.at(2)
    world.cluster.end("failed", 1)
    world.at(2, 10)
    assert world.submitted == ["010000", "020000"]


def test_a_clock_that_was_ahead_disables_nothing(make: Callable[..., World]) -> None:
    world = make(retries=1)
    world.now = START.replace(year=2031)
    world.server.look()
    world.cluster.end("failed", 1)
    world.server.look()  # the next attempt is due in 2031
    world.folder.write(dataclasses.replace(world.schedule, added=stamp(world.now)))
    world.lines.clear()
    world.at(0, 40)
    assert "the clock was ahead" in world.lines[0]
    assert list(world.cluster.jobs)[-1].endswith("-2")
    world.cluster.end()
    world.at(0, 50)
    world.at(1, 0)
    assert world.submitted[-1] == "010000"
    assert len([line for line in world.lines if "the clock was ahead" in line]) == 1


def test_a_clock_that_was_behind_runs_nothing_twice(make: Callable[..., World]) -> None:
    world = make(added="2025-01-01T00:00:00+00:00")
    world.at(1)
    world.cluster.end()
    world.at(1, 1)
    world.now = START.replace(year=1970)  # as before a first answer of a time server
    world.server.look()
    world.at(1, 2)
    world.cluster.jobs.clear()  # the machine's cluster started anew, too
    world.at(1, 3)
    assert world.submitted == []
    assert ("01:00", "succeeded") in world.history
    world.at(2)
    assert world.submitted == ["020000"]


@pytest.mark.parametrize("file", ["hourly.state.json", "hourly.history.jsonl"])
def test_a_file_that_cannot_be_read_for_a_moment_is_not_taken_for_none(
    file: str, make: Callable[..., World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world = make()
    world.at(1)
    world.cluster.end()
    world.at(1, 1)
    world.at(2)
    world.cluster.end()
    before = (world.state, world.history)
    read = Path.read_text

    def stale(path: Path, *arguments: Any, **options: Any) -> str:
        if path.name == file:
            raise OSError(errno.ESTALE, "Stale file handle")
        return read(path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", stale)
        world.at(2, 1)
        world.at(2, 2)
    assert (world.state, world.history) == before
    assert len([line for line in world.lines if "Stale file handle" in line]) == 1
    world.at(2, 3)
    assert world.history == [("01:00", "succeeded"), ("02:00", "succeeded")]


def test_a_state_that_was_lost_does_not_rewrite_the_history(make: Callable[..., World]) -> None:
    world = make()
    for hour in (1, 2, 3):
        world.at(hour)
        world.cluster.end("failed" if hour == 2 else "succeeded", hour == 2)
        world.at(hour, 1)
    before = world.folder.history("hourly")
    (world.folder.path / "hourly.state.json").unlink()
    world.at(3, 2)
    assert world.folder.history("hourly") == before
    assert world.submitted == ["010000", "020000", "030000"]
    skipped = dataclasses.replace(before[0], outcome="skipped")
    world.folder.record(world.schedule, skipped)
    assert world.folder.history("hourly") == before


def story(world: World) -> None:
    """Two days' worth of everything: success, overlap, failure, retry, silence, a request."""
    world.at(1)
    world.at(2)
    world.cluster.end()
    world.at(2, 10)
    world.folder.ask(world.schedule, world.now)
    world.at(2, 11)
    world.cluster.end("failed", 1)
    world.at(2, 12)
    world.at(2, 14)
    world.cluster.end()
    world.at(2, 15)
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(3)
    world.cluster.trouble = None
    world.at(3, 1)
    world.cluster.end()
    world.at(6, 10)
    world.cluster.end()
    world.at(6, 20)
    world.at(7)
    world.cluster.end("failed", 1)
    world.at(7, 1)
    world.cluster.trouble = NoAnswerError("nobody answers")
    world.at(7, 2)
    world.cluster.trouble = None
    world.at(7, 3)
    world.cluster.end()
    world.at(7, 4)


EFFECTS = ("write_state", "record", "forget_asked")


def test_a_kill_at_any_effect_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # thousands of them; no power is cut

    def lived(kill_at: int | None) -> tuple[World, int]:
        """Live through the story; the server dies before or after one effect and starts again."""
        world = World(tmp_path / str(kill_at), on_overlap="queue", retries=2)
        world.cluster.strict = True
        count = 0

        def mortal(effect: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                nonlocal count
                moments = []
                for _ in ("before", "after"):
                    moments.append(count)
                    count += 1
                if moments[0] == kill_at:
                    raise Killed
                result = effect(*arguments)
                if moments[1] == kill_at:
                    raise Killed
                return result

            return run

        for name in EFFECTS:
            setattr(world.folder, name, mortal(getattr(world.folder, name)))
        world.cluster.submit = mortal(world.cluster.submit)  # type: ignore[method-assign]
        look = Server.look

        def surviving_look() -> None:
            try:
                look(world.server)
            except Killed:
                world.restart()
                world.server.look = surviving_look  # type: ignore[method-assign]
                look(world.server)

        world.server.look = surviving_look  # type: ignore[method-assign]
        story(world)
        return world, count

    undisturbed, effects = lived(None)
    assert effects > 40
    expected = undisturbed.folder.history("hourly")
    assert {entry.outcome for entry in expected} >= {"succeeded", "failed", "skipped"}
    assert {entry.attempt for entry in expected} == {1, 2}
    for kill_at in range(effects):
        world, _ = lived(kill_at)
        assert set(world.cluster.submissions.values()) == {1}, kill_at
        assert world.cluster.submissions == undisturbed.cluster.submissions, kill_at
        assert _essence(world.folder.history("hourly")) == _essence(expected), kill_at
        assert world.state.active == undisturbed.state.active
        assert world.state.queued == undisturbed.state.queued


def _essence(entries: list[Entry]) -> list[tuple[str, str, int]]:
    return [(entry.job, entry.outcome, entry.attempt) for entry in entries]
