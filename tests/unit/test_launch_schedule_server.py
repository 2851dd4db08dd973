"""The schedule server: each time once, whatever is killed; overlaps, deadlines, retries."""

import dataclasses
import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from schedule_world import START, World

from alignrec.errors import StageFailure, UserError
from launch.jobs import NoAnswerError, RefusedError
from launch.schedule.definition import Schedule
from launch.schedule.store import stamp


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
