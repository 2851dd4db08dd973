"""Schedules: times of cron expressions, clock changes, commands, what they refuse."""

import datetime
import json
import os
import zoneinfo
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch.__main__ as launch_command
from alignrec.errors import UserError
from alignrec.testing.processes import free_port
from launch.jobs import JobExistsError
from launch.recipe import Recipe
from launch.schedule import definition, submitting, timetable
from launch.schedule.store import Entry, Folder, State, stamp

UTC = datetime.UTC
BERLIN = "Europe/Berlin"


def utc(text: str) -> datetime.datetime:
    return datetime.datetime.fromisoformat(text).replace(tzinfo=UTC)


def berlin(cron: str, day: str, *, days: int = 1) -> list[str]:
    """Return the local times with their offset that a day and what follows has."""
    zone = zoneinfo.ZoneInfo(BERLIN)
    start = datetime.datetime.fromisoformat(day).replace(tzinfo=zone)
    before = start.astimezone(UTC) - datetime.timedelta(seconds=1)
    end = (start + datetime.timedelta(days=days)).astimezone(UTC)
    until = end - datetime.timedelta(seconds=1)
    times = timetable.between(cron, BERLIN, before, until)
    return [time.astimezone(zone).strftime("%d %H:%M %z") for time in times]


def test_a_time_is_the_same_on_the_wall_in_summer_and_winter() -> None:
    assert timetable.following("0 3 * * *", BERLIN, utc("2026-01-10")) == utc("2026-01-10 02:00")
    assert timetable.following("0 3 * * *", BERLIN, utc("2026-07-10")) == utc("2026-07-10 01:00")
    assert timetable.following("0 3 * * *", "UTC", utc("2026-07-10")) == utc("2026-07-10 03:00")


def test_a_time_that_the_clock_skips_comes_at_once_after_it() -> None:
    assert berlin("30 2 * * *", "2026-03-28", days=3) == [
        "28 02:30 +0100",
        "29 03:00 +0200",
        "30 02:30 +0200",
    ]
    several = berlin("0,30 2,3 * * *", "2026-03-29")
    assert several == ["29 03:00 +0200", "29 03:30 +0200"]  # not three o'clock twice


def test_a_time_that_comes_twice_counts_once() -> None:
    assert berlin("30 2 * * *", "2026-10-24", days=3) == [
        "24 02:30 +0200",
        "25 02:30 +0200",
        "26 02:30 +0100",
    ]
    between_the_two = utc("2026-10-25 01:10")  # 02:10, the second one
    following = timetable.following("30 2 * * *", BERLIN, between_the_two)
    assert following == utc("2026-10-26 01:30")


def test_every_hour_is_every_hour_that_there_is() -> None:
    assert [len(berlin("0 * * * *", f"2026-{day}")) for day in ("03-29", "10-25", "11-01")] == [
        23,
        25,
        24,
    ]
    assert berlin("*/30 2 * * *", "2026-03-29") == []
    assert len(berlin("*/30 2 * * *", "2026-10-25")) == 4


@pytest.mark.parametrize("cron", ["17 3 * * *", "*/7 * * * *", "0,30 1-3 * * 0", "5 4 L * *"])
def test_one_step_at_a_time_finds_the_same_times(cron: str) -> None:
    start = utc("2026-10-01")
    end = utc("2026-11-02")
    stepped, time = [], timetable.following(cron, BERLIN, start)
    while time <= end:
        stepped.append(time)
        time = timetable.following(cron, BERLIN, time)
    assert stepped == timetable.between(cron, BERLIN, start, end)
    assert stepped == sorted(set(stepped))


@pytest.mark.parametrize(
    "timezone", ["America/Santiago", "Asia/Beirut", "Australia/Lord_Howe", "Atlantic/Azores"]
)
def test_every_day_has_its_time_once_where_clocks_change_at_midnight(timezone: str) -> None:
    zone = zoneinfo.ZoneInfo(timezone)
    first = datetime.datetime(2026, 1, 1, tzinfo=zone).astimezone(UTC)
    before = first - datetime.timedelta(seconds=1)
    until = first + datetime.timedelta(days=364, hours=12)
    times = timetable.between("0 0 * * *", timezone, before, until)
    days = [time.astimezone(zone).date() for time in times]
    assert days == [datetime.date(2026, 1, 1) + datetime.timedelta(days=n) for n in range(365)]


def test_the_times_of_a_long_absence_are_bounded() -> None:
    times = timetable.between("0 3 * * *", "UTC", utc("1970-01-01"), utc("2026-01-01"))
    assert 365 <= len(times) <= 367


@pytest.mark.parametrize(
    ("cron", "timezone", "fault"),
    [
        ("61 3 * * *", "UTC", "61 is no minute"),
        ("0 24 * * *", "UTC", "24 is no hour"),
        ("0 3 0 * *", "UTC", "0 is no day-of-month"),
        ("0 3 * 13 *", "UTC", "13 is no month"),
        ("0 3 * * MONDAY", "UTC", "MONDAY is no day-of-week"),
        ("0 3 * * MON#2/2", "UTC", "MON#2/2 is no day-of-week"),
        ("*/0 3 * * *", "UTC", "*/0 is no minute"),
        ("0 3 * *", "UTC", "has 4 fields, not five"),
        ("0 0 3 * * *", "UTC", "has 6 fields, not five"),
        ("@daily", "UTC", "has 1 fields, not five"),
        ("0 3 31 2,4 *", "UTC", "never comes"),
        ("0 3 * * *", "Europe/Berlim", "Did you mean Europe/Berlin"),
        ("0 3 * * *", "../../etc/passwd", "is no time zone"),
        ("0 3 * * *", "", "is no time zone"),
    ],
)
def test_what_never_comes_is_refused(cron: str, timezone: str, fault: str) -> None:
    with pytest.raises(UserError) as caught:
        timetable.check(cron, timezone)
    message = str(caught.value)
    assert fault in message
    assert message.startswith("--timezone" if timezone != "UTC" else f"--cron {cron!r}")


def test_the_job_of_a_time_always_has_the_same_id() -> None:
    values = {
        "recipe": "demo",
        "run_dir": "/runs",
        "directory": "/",
        "added": "",
        "cron": "0 3 * * *",
    }
    schedule = definition.build(values | {"name": "nightly", "mark": "ab12"})
    time = utc("2026-01-10 02:00")
    assert schedule.job_id(time) == "nightly-20260110-020000-ab12"
    assert schedule.job_id(time, attempt=2) == "nightly-20260110-020000-ab12-2"
    waits = [schedule.wait_after(attempt).total_seconds() for attempt in (1, 2, 3, 9)]
    assert waits == [60, 120, 240, 3600]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ALIGNREC_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def schedule_command(*arguments: str, code: int = 0) -> None:
    assert launch_command.main(["schedule", *arguments]) == code


def add(*arguments: str, name: str = "nightly", code: int = 0) -> None:
    schedule_command("add", name, "--cron", "0 3 * * *", *arguments, code=code)


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    schedule_command("list", "--json")
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return answer


def test_a_schedule_is_added_listed_changed_and_removed(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add("demo", "--until", "data_prep", "--set", "data_prep.shards.max_samples=100")
    assert "nothing runs yet: python -m launch schedule serve" in capsys.readouterr().err
    schedule = Folder().read("nightly")
    assert schedule.run_dir == tmp_path / "runs" / "demo"
    assert schedule.directory == tmp_path
    assert schedule.selection.options == ["--until", "data_prep"]
    answer = listed(capsys)
    assert answer["server"] is None
    (row,) = answer["schedules"]
    assert (row["name"], row["recipe"], row["last"]) == ("nightly", "demo", None)
    assert datetime.datetime.fromisoformat(row["next"]).hour == 3

    add("demo", "--replace", "--timezone", BERLIN, "--retries", "3")
    assert listed(capsys)["schedules"][0]["timezone"] == BERLIN
    schedule_command("remove", "nightly")
    assert listed(capsys)["schedules"] == []
    assert [path.name for path in (home / "schedules").iterdir()] == [".server.lock"]


def test_a_recipe_of_ones_own_is_found_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("data_prep: {source: synthetic}")
    add("mine.yaml", "--run-dir", "here")
    schedule = Folder().read("nightly")
    assert schedule.recipe == str(tmp_path / "mine.yaml")
    assert schedule.run_dir == tmp_path / "here"


def test_variables_of_the_recipe_are_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that systemd starts knows nothing of the shell in which a schedule was added."""
    recipe = tmp_path / "mine.yaml"
    monkeypatch.setenv("SHOP", "north")
    recipe.write_text("data_prep: {source: synthetic, images: {revision: '${SHOP}'}}")
    add("mine.yaml")
    monkeypatch.delenv("SHOP")
    seen: list[Any] = []

    class Jobs:
        def __init__(self, address: str | None) -> None:
            seen.append(address)

        def submit(self, made: Recipe, run_dir: Path, options: list[str], **rest: Any) -> str:
            seen.extend([made.variables(), rest["job_id"], rest["directory"]])
            raise JobExistsError("as after a kill")

    monkeypatch.setattr(submitting, "Jobs", Jobs)
    submitting.RayJobs().submit(Folder().read("nightly"), "nightly-1")
    assert seen == [None, {"SHOP": "north"}, "nightly-1", tmp_path]
    assert "SHOP" not in os.environ


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["demoo"], "Did you mean demo?"),
        (["demo", "--until", "graf"], "Did you mean graph?"),
        (["demo", "--from", "align", "--until", "graph"], "nothing would run"),
        (["demo", "--set", "align.seed=many"], "align.seed must be a whole number"),
        (["demo", "--timezone", "Berlin"], "Did you mean Europe/Berlin?"),
        (["demo", "--retries", "-1"], "schedule.retries=-1 is out of range"),
        (["demo", "--deadline", "0"], "schedule.deadline=0"),
        (["demo", "--deadline", "inf"], "schedule.deadline=inf"),
        (
            ["demo", "--retry-wait", "1e15"],
            "schedule.retry_wait=1000000000000000.0 is out of range",
        ),
        (["demo", "--retry-wait", "nan"], "not a number"),
        (["demo", "--address", "http://[::1"], "Write it as http://HOST:8265"),
        (["demo", "--address", "http://ray:port"], "Write it as http://HOST:8265"),
        (["demo", "--set", "align.seed=2026-13-45"], "not valid YAML"),
        (["demo", "--keep-history", "0"], "schedule.keep_history=0"),
        (["demo", "--address", "ray:8265"], "Write it as http://HOST:8265"),
        (["demo", "--folder", "/proc/nowhere"], "/proc/nowhere cannot be used"),
    ],
)
def test_a_mistake_is_one_line_and_adds_nothing(
    arguments: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add(*arguments, code=2)
    error = capsys.readouterr().err
    assert fault in error
    assert error.count("\n") == 1
    assert not Folder().names()


@pytest.mark.parametrize("name", ["Nightly", "a/b", "..", "", "-x", "n" * 41, "a.b", "a-"])
def test_a_name_that_no_file_could_have_is_refused(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="cannot name a schedule"):
        definition.build(
            {
                "name": name,
                "cron": "0 3 * * *",
                "recipe": "demo",
                "run_dir": "/",
                "directory": "/",
                "mark": "",
                "added": "",
            }
        )


def test_names_are_neither_taken_twice_nor_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    add("demo")
    add("demo", code=2)
    assert "Change it with --replace" in capsys.readouterr().err
    for action in ("remove", "run", "history"):
        schedule_command(action, "nightli", code=2)
        assert "Did you mean nightly?" in capsys.readouterr().err
        schedule_command(action, "../nightly", code=2)
        assert "there is no such schedule" in capsys.readouterr().err


def test_the_history_is_shown_and_bounded(capsys: pytest.CaptureFixture[str]) -> None:
    add("demo", "--timezone", BERLIN, "--keep-history", "2")
    schedule_command("history", "nightly")
    assert "has not run yet" in capsys.readouterr().out
    folder = Folder()
    schedule = folder.read("nightly")
    for day in (10, 11, 12):
        time = f"2026-01-{day}T02:00:00+00:00"
        entry = Entry(f"job-{day}", time, "failed", exit_code=1, reason="too many bad items")
        folder.record(schedule, entry)
        folder.record(schedule, entry)  # as after a kill
    schedule_command("history", "nightly")
    assert capsys.readouterr().out.splitlines() == [
        "2026-01-11 03:00 CET  failed (exit code 1)  job-11: too many bad items",
        "2026-01-12 03:00 CET  failed (exit code 1)  job-12: too many bad items",
    ]
    schedule_command("history", "nightly", "--json")
    assert json.loads(capsys.readouterr().out)[1]["exit_code"] == 1
    schedule_command("list")
    assert "last    2026-01-12 03:00 CET  failed (exit code 1)" in capsys.readouterr().out


def test_a_damaged_file_is_one_line_and_the_others_are_listed(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    add("demo", name="good")
    add("demo", name="bad")
    (home / "schedules" / "bad.json").write_text('{"name": "bad"')
    rows = {row["name"]: row for row in listed(capsys)["schedules"]}
    assert "is damaged, so bad does not run" in rows["bad"]["error"]
    assert "error" not in rows["good"]
    schedule_command("remove", "bad")
    assert Folder().names() == ["good"]


def test_a_folder_that_is_a_file_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for action in ("list", "serve"):
        schedule_command(action, "--folder", "file", code=2)
        assert "file cannot be used (" in capsys.readouterr().err


def test_one_server_serves_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    folder = Folder()
    with folder.served():
        schedule_command("serve", code=1)
        error = capsys.readouterr().err
        assert "are served by process" in error
        assert error.count("\n") == 1
    assert folder.server() is None
    for every in ("0", "nan", "inf"):
        schedule_command("serve", "--every", every, code=2)


def test_a_cron_job_has_what_the_server_would_do(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    there = ["--address", address, "--run-dir", "/data/runs/shop", "--until", "data_prep"]
    limits = ["--deadline", "3600", "--retries", "2", "--keep-history", "7", "--timezone", BERLIN]
    add("demo", *there, *limits, "--set", "data_prep.max_bad_fraction=0.02")
    capsys.readouterr()
    schedule_command("render", "kubernetes", "nightly", "--image", "registry/alignrec:1")
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert (manifest["kind"], manifest["metadata"]["name"]) == ("CronJob", "nightly")
    spec = manifest["spec"]
    job = spec.pop("jobTemplate")["spec"]
    assert spec == {
        "schedule": "0 3 * * *",
        "timeZone": BERLIN,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": 3600,
        "successfulJobsHistoryLimit": 7,
        "failedJobsHistoryLimit": 7,
    }
    assert job["backoffLimit"] == 2
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2]
    (container,) = job["template"]["spec"]["containers"]
    assert {"name": "ALIGNREC_DIRECTORY", "value": str(Path.cwd())} in container["env"]
    command = container["command"]
    assert command[:3] == ["python", "-m", "launch"]
    assert launch_command.main(command[3:]) == 2  # understood: only the cluster is missing
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


def test_a_recipe_of_ones_own_is_somewhere_in_the_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("data_prep: {source: synthetic}")
    add("mine.yaml", "--address", "http://ray:8265")
    render = ["render", "kubernetes", "nightly", "--image", "registry/alignrec:1"]
    for wrong in ([], ["--recipe-path", "mine.yaml"], ["--recipe-path", "/recipes/mine"]):
        capsys.readouterr()
        schedule_command(*render, *wrong, code=2)
        assert "--recipe-path" in capsys.readouterr().err
    schedule_command(*render, "--recipe-path", "/recipes/mine.yaml")
    pod = yaml.safe_load(capsys.readouterr().out)["spec"]["jobTemplate"]["spec"]["template"]
    assert pod["spec"]["containers"][0]["command"][4] == "/recipes/mine.yaml"
    add("demo", "--address", "http://ray:8265", "--replace")
    schedule_command(*render, "--recipe-path", "/recipes/mine.yaml", code=2)
    assert "Leave it out" in capsys.readouterr().err


def test_relative_paths_start_where_a_manifest_says(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen: list[Path] = []

    class Jobs:
        address = "http://ray:8265"

        def __init__(self, address: str | None) -> None:
            pass

        def submit(self, *arguments: Any, directory: Path) -> str:
            seen.append(directory)
            return "job"

    monkeypatch.setattr(launch_command, "Jobs", Jobs)
    assert launch_command.main(["submit", "demo"]) == 0
    monkeypatch.setenv("ALIGNREC_DIRECTORY", "/data")
    assert launch_command.main(["submit", "demo"]) == 0
    assert seen == [Path.cwd(), Path("/data")]


@pytest.mark.parametrize(
    "cron", ["0 3 * * 0", "*/7 3 1-5/2 JAN mon,5-6", "0 3 * 7 */7", "7 7 7 * *"]
)
def test_crons_that_kubernetes_reads_alike(cron: str) -> None:
    timetable.check_for_kubernetes(cron)


@pytest.mark.parametrize(
    ("cron", "fault"),
    [
        ("0 3 L * *", "L and #"),
        ("0 3 LW * *", "L and #"),
        ("0 3 * * 5L", "L and #"),
        ("0 3 * * MON#2", "L and #"),
        ("0 3 * * 7", "Write 0"),
        ("0 3 * * 1,5-7", "Write 0"),
        ("0 3 * * 1/2", "1-6/2"),
        ("0 3 */2 * MON", "two limited days"),
        ("0 3 1 * */2", "two limited days"),
    ],
)
def test_crons_that_kubernetes_reads_otherwise_are_refused(cron: str, fault: str) -> None:
    timetable.check(cron, "UTC")
    with pytest.raises(UserError, match=fault):
        timetable.check_for_kubernetes(cron)


def test_the_next_time_is_one_that_is_not_decided_yet(capsys: pytest.CaptureFixture[str]) -> None:
    add("demo")
    folder = Folder()
    schedule = folder.read("nightly")
    ahead = datetime.datetime.now(UTC) + datetime.timedelta(days=3)
    folder.write_state(schedule, State(stamp(ahead)))
    (row,) = listed(capsys)["schedules"]
    assert datetime.datetime.fromisoformat(row["next"]) > ahead


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ([], "has no --address"),
        (["--address", "http://ray:8265", "--on-overlap", "queue"], "queue"),
    ],
)
def test_what_a_cron_job_cannot_do_is_refused(
    options: list[str], fault: str, capsys: pytest.CaptureFixture[str]
) -> None:
    add("demo", *options)
    capsys.readouterr()
    schedule_command("render", "kubernetes", "nightly", "--image", "registry/alignrec:1", code=2)
    assert fault in capsys.readouterr().err
