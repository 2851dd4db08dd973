"""The folder of the schedules: definitions, where each stands, what became of its times.

``NAME.json`` is written by commands, ``NAME.state.json`` and ``NAME.history.jsonl`` by the server
alone, each by rename: a kill at any moment leaves the old file or the new one.
"""

import contextlib
import dataclasses
import datetime
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from alignrec import artifacts, configuration
from alignrec.configuration import option
from alignrec.errors import UserError
from cluster import state as cluster_state
from launch import lock
from launch.schedule import definition
from launch.schedule.definition import Schedule

Outcome = Literal["succeeded", "failed", "stopped", "lost", "skipped"]
_STATE, _HISTORY, _ASKED, _LOCK = ".state.json", ".history.jsonl", ".asked.json", ".server.lock"


@dataclasses.dataclass(frozen=True)
class Active:
    """The run that is under way.

    ``submitting``: it is about to be submitted, or was and nobody wrote it down. ``waiting``: an
    attempt failed, and the next one begins at ``since``.
    """

    time: str = option(help="the time it is the run of")
    job: str = option(help="submission id")
    phase: Literal["submitting", "running", "waiting"] = option(help="how far it is")
    since: str = option(help="since when, or from when on")
    attempt: int = option(1, "number of the attempt", minimum=1)
    trouble: str = option("", "why it is not submitted yet")

    def __post_init__(self) -> None:
        """Refuse what are no times."""
        moment(self.time)
        moment(self.since)


@dataclasses.dataclass(frozen=True)
class State:
    """Where a schedule stands."""

    decided: str = option(help="every time up to this one has been decided on")
    active: Active | None = option(None, "the run under way")
    queued: str | None = option(None, "the time whose run begins when that is over")

    def __post_init__(self) -> None:
        """Refuse what are no times."""
        for time in (self.decided, self.queued or self.decided):
            moment(time)


@dataclasses.dataclass(frozen=True)
class Entry:
    """What became of one time, or of one attempt at it."""

    job: str = option(help="submission id")
    time: str = option(help="the time it is the run of")
    outcome: Outcome = option(help="how it ended")
    exit_code: int | None = option(None, "of its command")
    attempt: int = option(1, "number of the attempt")
    started: str | None = option(None, "when it began")
    ended: str = option("", "when that was known")
    reason: str = option("", "why, where it did not succeed")

    def __post_init__(self) -> None:
        """Refuse what is no time."""
        moment(self.time)


class Folder:
    """Schedules on disk.

    Args:
        path: the folder; None for ``schedules`` in ALIGNREC_HOME, else in ~/.alignrec.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path or cluster_state.home() / "schedules"

    def names(self) -> list[str]:
        """Return the names of all schedules."""
        files = self.path.glob("*.json")
        return sorted(file.stem for file in files if "." not in file.stem)

    def read(self, name: str) -> Schedule:
        """Return a schedule.

        Raises:
            UserError: there is none of that name, or its file is damaged.
        """
        path = self._file(name, ".json")
        if name not in self.names():
            close = configuration.nearest(name, self.names())
            hint = f"Did you mean {' or '.join(close)}?" if close else "See launch schedule list."
            raise UserError(f"{name}: there is no such schedule in {self.path}. {hint}")
        try:
            return definition.build(_load(path))
        except OSError as error:
            raise UserError(
                f"{path} cannot be read ({error.strerror}), so {name} does not run. Look at the "
                f"storage."
            ) from error
        except UserError as error:
            raise UserError(
                f"{path} is damaged, so {name} does not run: {error} Add it again with --replace."
            ) from error

    def write(self, schedule: Schedule) -> None:
        """Add a schedule, or replace the one of its name."""
        self._make()
        path = self._file(schedule.name, ".json")
        artifacts.write_json(path, configuration.to_mapping(schedule))

    def remove(self, name: str) -> None:
        """Remove a schedule with its state and history."""
        for ending in (".json", _ASKED, _STATE, _HISTORY):
            self._file(name, ending).unlink(missing_ok=True)

    def state(self, schedule: Schedule) -> State:
        """Return where a schedule stands; a damaged file counts as none.

        Without one, what the history knows is decided, and the newest time after that is decided on
        again: its job has the id that it had, which the cluster refuses to take twice.

        Raises:
            OSError: the file is there and cannot be read now.
        """
        with contextlib.suppress(FileNotFoundError, ValueError):
            return configuration.build(
                State, _load(self._file(schedule.name, _STATE)), section="state"
            )
        known = (moment(entry.time) for entry in self.history(schedule.name))
        return State(stamp(max([moment(schedule.added), *known])))

    def write_state(self, schedule: Schedule, state: State) -> None:
        """Record where a schedule stands."""
        path = self._file(schedule.name, _STATE)
        artifacts.write_json(path, configuration.to_mapping(state))

    def history(self, name: str) -> list[Entry]:
        """Return what became of a schedule's times, oldest first.

        Raises:
            OSError: the file is there and cannot be read now.
        """
        try:
            text = self._file(name, _HISTORY).read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        entries = []
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # a line that somebody edited
                entries.append(configuration.build(Entry, json.loads(line), section="entry"))
        return entries

    def record(self, schedule: Schedule, entry: Entry) -> None:
        """Add an entry, or replace the one of the same job: after a kill it comes again.

        What ran is never replaced by its having been skipped.
        """
        history = self.history(schedule.name)
        if entry.outcome == "skipped" and any(
            other.job == entry.job and other.outcome != "skipped" for other in history
        ):
            return
        kept = [other for other in history if other.job != entry.job]
        entries = [*kept, entry][-schedule.keep_history :]
        text = "".join(json.dumps(dataclasses.asdict(e)) + "\n" for e in entries)
        path = self._file(schedule.name, _HISTORY)
        spare = path.with_name(f".{path.name}.{os.getpid()}")
        spare.write_text(text, encoding="utf-8")
        spare.replace(path)

    def ask(self, schedule: Schedule, time: datetime.datetime) -> None:
        """Ask the server for a run now."""
        artifacts.write_json(self._file(schedule.name, _ASKED), {"time": stamp(time)})

    def asked(self, name: str) -> str | None:
        """Return when a run was asked for; None when none was."""
        try:
            return stamp(moment(_load(self._file(name, _ASKED))["time"]))
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def forget_asked(self, name: str, time: str) -> None:
        """Remove a request that was granted or refused, unless a newer one has come."""
        if self.asked(name) == time:
            self._file(name, _ASKED).unlink(missing_ok=True)

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Be the one server of this folder for the length of the block.

        Raises:
            UserError: another process serves it, or it cannot be made.
        """
        self._make()

        def refusal(holder: str) -> str:
            return (
                f"the schedules of {self.path} are served by {holder}: two servers would submit "
                f"every run twice. Stop that one, or choose another --folder."
            )

        with lock.held(self.path / _LOCK, refusal=refusal):
            yield

    def server(self) -> str | None:
        """Return which process serves the folder; None when none does.

        Raises:
            UserError: the folder cannot be read.
        """
        try:
            return lock.holder(self.path / _LOCK)
        except OSError as error:
            raise self._unusable(error) from error

    def _make(self) -> None:
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            (self.path / _LOCK).touch()
        except OSError as error:
            raise self._unusable(error) from error

    def _unusable(self, error: OSError) -> UserError:
        return UserError(
            f"the folder of the schedules {self.path} cannot be used ({error.strerror}). Choose "
            f"another with --folder."
        )

    def _file(self, name: str, ending: str) -> Path:
        return self.path / f"{name}{ending}"


def stamp(time: datetime.datetime) -> str:
    """Return a time in UTC as text; texts sort as their times do."""
    return time.astimezone(datetime.UTC).isoformat(timespec="seconds")


def moment(text: str) -> datetime.datetime:
    """Return the time of such a text.

    Raises:
        ValueError: it is none, or of an unknown zone.
    """
    time = datetime.datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return time


def _load(path: Path) -> Any:  # noqa: ANN401 - any JSON value
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"cannot read {path}: {error}.") from error
