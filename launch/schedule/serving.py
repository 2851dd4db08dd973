"""The server of schedules: what is due is submitted, what is over is recorded (store -> cluster).

A look does what is due for each schedule and returns. What is about to be submitted is written down
before, under a submission id that follows from the schedule and the time alone: a server that was
killed at any moment submits it again, and the cluster refuses a second job of that id.
"""

import dataclasses
import datetime
from collections.abc import Callable

from alignrec.errors import StageFailure, UserError
from launch.jobs import Job, NoAnswerError, RefusedError
from launch.schedule.definition import LONGEST_WAIT, Schedule
from launch.schedule.store import Active, Entry, Folder, Outcome, State, moment, stamp
from launch.schedule.submitting import Cluster

Time = datetime.datetime
_MISTAKE = 2  # exit code of a run that would fail the same way again
_RETRIED: tuple[Outcome, ...] = ("failed", "lost")
_PASSING = (NoAnswerError, RefusedError, StageFailure)  # trouble with a cluster that may pass
_AHEAD = datetime.timedelta(hours=1)  # what is decided later than this was decided by a wrong clock


class Server:
    """Brings every schedule of a folder up to date, look by look.

    Args:
        folder: the schedules; nobody else may serve it.
        cluster: where runs go.
        clock: the time now, in UTC.
        show: gets one line for everything that happens.
    """

    def __init__(
        self,
        folder: Folder,
        cluster: Cluster,
        *,
        clock: Callable[[], Time],
        show: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._cluster = cluster
        self._clock = clock
        self._show = show
        self._complaints: set[tuple[str, str]] = set()
        self._told: set[tuple[str, str]] = set()

    def look(self) -> None:
        """Do what is due; trouble of one schedule does not touch the others."""
        self._told, self._complaints = self._complaints, set()
        try:
            names = self._folder.names()
        except OSError as error:  # storage that is away for a moment
            self._complain(str(self._folder.path), str(error))
            return
        for name in names:
            try:
                self._advance(self._folder.read(name))
            except (UserError, StageFailure, OSError) as error:
                self._complain(name, str(error))
            except Exception as error:  # unforeseen, and no reason to stop for the others
                self._complain(name, f"{type(error).__name__}: {error}")

    def _advance(self, schedule: Schedule) -> None:
        state = self._stand(schedule)
        if state.active is not None:
            state = self._tend(schedule, state, state.active)
        if state.active is None and state.queued is not None:
            state = self._admit(
                schedule, dataclasses.replace(state, queued=None), moment(state.queued)
            )
            state = self._submit(schedule, self._put(schedule, state))
        if state.active is None or state.active.phase != "submitting":
            state = self._decide(schedule, state)
        if state.active is None or state.active.phase != "submitting":
            self._grant_asked(schedule, state)

    def _stand(self, schedule: Schedule) -> State:
        """Return where a schedule stands, put right where the clock was ahead for a while.

        Otherwise nothing would run until the clock is there again.
        """
        state = self._folder.state(schedule)
        now = self._clock()
        if moment(schedule.added) <= now + _AHEAD:
            decided = max(moment(state.decided), moment(schedule.added))
            state = dataclasses.replace(state, decided=stamp(decided))
        active = state.active
        if active and active.phase == "waiting" and moment(active.since) > now + LONGEST_WAIT:
            state = _with(state, dataclasses.replace(active, since=stamp(now)))
        if moment(state.decided) <= now + _AHEAD:
            return state
        self._say(
            schedule.name,
            f"times up to {state.decided} were decided on already: the clock was ahead, or is "
            f"behind now. Going on from now; look at this machine's time",
        )
        return self._put(schedule, dataclasses.replace(state, decided=stamp(now)))

    def _tend(self, schedule: Schedule, state: State, active: Active) -> State:
        """Bring the run under way further."""
        if active.phase == "running":
            return self._watch(schedule, state, active)
        if active.phase == "waiting":
            if why := self._ends_attempts(schedule, state, active):
                return self._give_up(schedule, state, active, why)
            if self._clock() < moment(active.since):
                return state
            attempt = active.attempt + 1
            job = schedule.job_id(moment(active.time), attempt=attempt)
            again = Active(active.time, job, "submitting", self._stamp(), attempt)
            return self._submit(schedule, self._put(schedule, _with(state, again)))
        return self._resubmit(schedule, state, active)

    def _resubmit(self, schedule: Schedule, state: State, active: Active) -> State:
        """Submit what an earlier look could not, or was killed over, if it should still begin.

        The cluster is asked first: it may have the job, and the recipe may be broken by now.
        """
        try:
            job = self._cluster.find(schedule, active.job)
        except _PASSING as error:
            return self._trouble(schedule, state, active, error)
        if job is not None:
            return self._put(schedule, _with(state, self._running(active)))
        if active.attempt > 1:
            if why := self._ends_attempts(schedule, state, active):
                return self._give_up(schedule, state, active, why)
        elif self._is_outdated(schedule, state, active):
            reason = active.trouble or "no server was there"
            self._skip(schedule, moment(active.time), f"not submitted in time: {reason}")
            return self._put(schedule, _with(state, None))
        return self._submit(schedule, state)

    def _is_outdated(self, schedule: Schedule, state: State, active: Active) -> bool:
        """Whether a first attempt that is not submitted yet should not begin any more."""
        now = self._clock()
        newer = schedule.following(moment(state.decided)) <= now
        return (bool(active.trouble) and newer) or schedule.is_too_late(moment(active.time), now)

    def _ends_attempts(self, schedule: Schedule, state: State, active: Active) -> str:
        """Return why a run that failed is not tried again after all; empty when it may be."""
        now = self._clock()
        if state.queued is not None or schedule.following(moment(state.decided)) <= now:
            return "a newer time has come"
        late = schedule.is_too_late(moment(active.time), max(now, moment(active.since)))
        return f"more than {schedule.deadline:g} s late" if late else ""

    def _give_up(self, schedule: Schedule, state: State, active: Active, why: str) -> State:
        self._say(schedule.name, f"no further attempt at {active.time}: {why}")
        return self._put(schedule, _with(state, None))

    def _submit(self, schedule: Schedule, state: State) -> State:
        """Submit the run that is written down as about to be submitted, if there is one."""
        active = state.active
        if active is None or active.phase != "submitting":
            return state
        try:
            self._cluster.submit(schedule, active.job)
        except _PASSING as error:
            return self._trouble(schedule, state, active, error)  # the next look tries again
        except UserError as error:
            entry = self._entry(active, "failed", exit_code=_MISTAKE, reason=str(error))
            self._record(schedule, entry)
            return self._put(schedule, _with(state, None))
        self._say(schedule.name, f"submitted {active.job}")
        return self._put(schedule, _with(state, self._running(active)))

    def _running(self, active: Active) -> Active:
        return dataclasses.replace(active, phase="running", since=self._stamp(), trouble="")

    def _trouble(self, schedule: Schedule, state: State, active: Active, error: Exception) -> State:
        """Write down why a run is not submitted yet, for those who look at the list."""
        self._complain(schedule.name, str(error))
        if active.trouble == str(error):
            return state
        troubled = dataclasses.replace(active, trouble=str(error))
        return self._put(schedule, _with(state, troubled))

    def _watch(self, schedule: Schedule, state: State, active: Active) -> State:
        """Record a run that is over, and arrange the next attempt where one is due."""
        job = self._cluster.find(schedule, active.job)
        if job is not None and not job.is_over:
            return state
        entry = self._ended(active, job)
        self._record(schedule, entry)
        again = (
            entry.outcome in _RETRIED
            and entry.exit_code != _MISTAKE
            and active.attempt <= schedule.retries
        )
        if not again:
            return self._put(schedule, _with(state, None))
        since = self._clock() + schedule.wait_after(active.attempt)
        waiting = dataclasses.replace(active, phase="waiting", since=stamp(since))
        if why := self._ends_attempts(schedule, state, waiting):
            return self._give_up(schedule, state, active, why)
        self._say(
            schedule.name,
            f"attempt {active.attempt + 1} of {schedule.retries + 1} at {stamp(since)}",
        )
        return self._put(schedule, _with(state, waiting))

    def _decide(self, schedule: Schedule, state: State) -> State:
        """Decide on the times that have come: the newest one counts, the others were missed."""
        due = schedule.between(moment(state.decided), self._clock())
        if not due:
            return state
        *missed, time = due
        if missed:
            more = f", with {len(missed) - 1} before it" if len(missed) > 1 else ""
            self._skip(schedule, missed[-1], f"missed{more}: no server or cluster was there")
        state = self._admit(schedule, dataclasses.replace(state, decided=stamp(time)), time)
        return self._submit(schedule, self._put(schedule, state))

    def _grant_asked(self, schedule: Schedule, state: State) -> None:
        """Decide on a run that was asked for by hand."""
        asked = self._folder.asked(schedule.name)
        if asked is None:
            return
        job = schedule.job_id(moment(asked))
        known = {entry.job for entry in self._folder.history(schedule.name)}
        known |= {state.active.job} if state.active is not None else set()
        if job not in known and state.queued != asked:
            state = self._put(schedule, self._admit(schedule, state, moment(asked)))
        self._folder.forget_asked(schedule.name, asked)
        self._submit(schedule, state)

    def _admit(self, schedule: Schedule, state: State, time: Time) -> State:
        """Return the state in which the run of a time is about to begin, queued or skipped."""
        job = schedule.job_id(time)
        if any(
            e.job == job and e.outcome != "skipped" for e in self._folder.history(schedule.name)
        ):
            return state  # it ran: the clock or the state went back
        late = (self._clock() - time).total_seconds()
        if schedule.is_too_late(time, self._clock()):
            self._skip(schedule, time, f"{late:.0f} s late, more than the {schedule.deadline:g} s")
            return state
        if state.active is None:
            return _with(state, Active(stamp(time), job, "submitting", self._stamp()))
        if schedule.on_overlap == "skip":
            self._skip(schedule, time, f"{state.active.job} was not over")
            return state
        if state.queued is not None:
            self._skip(schedule, moment(state.queued), "a later time took its place in the queue")
        self._say(schedule.name, f"{stamp(time)} begins when {state.active.job} is over")
        return dataclasses.replace(state, queued=stamp(time))

    def _skip(self, schedule: Schedule, time: Time, reason: str) -> None:
        job = schedule.job_id(time)
        entry = Entry(job, stamp(time), "skipped", ended=self._stamp(), reason=reason)
        self._record(schedule, entry)

    def _record(self, schedule: Schedule, entry: Entry) -> None:
        self._folder.record(schedule, entry)
        code = f" with exit code {entry.exit_code}" if entry.exit_code else ""
        reason = f": {entry.reason}" if entry.reason else ""
        subject = stamp(moment(entry.time)) if entry.outcome == "skipped" else entry.job
        self._say(schedule.name, f"{subject} {entry.outcome}{code}{reason}")

    def _ended(self, active: Active, job: Job | None) -> Entry:
        if job is None:
            return self._entry(active, "lost", reason="the cluster does not know the job any more")
        outcome: Outcome = "failed"
        if job.status in ("succeeded", "stopped"):
            outcome = "succeeded" if job.status == "succeeded" else "stopped"
        reason = "" if outcome == "succeeded" else job.message
        code = 0 if outcome == "succeeded" else job.exit_code
        entry = self._entry(active, outcome, exit_code=code, reason=reason)
        return dataclasses.replace(
            entry, started=_seconds(job.started), ended=_seconds(job.ended) or entry.ended
        )

    def _entry(
        self, active: Active, outcome: Outcome, *, exit_code: int | None = None, reason: str = ""
    ) -> Entry:
        return Entry(
            active.job,
            active.time,
            outcome,
            exit_code=exit_code,
            attempt=active.attempt,
            ended=self._stamp(),
            reason=reason,
        )

    def _put(self, schedule: Schedule, state: State) -> State:
        self._folder.write_state(schedule, state)
        return state

    def _stamp(self) -> str:
        return stamp(self._clock())

    def _say(self, name: str, line: str) -> None:
        self._show(f"{self._stamp()} {name}: {line}")

    def _complain(self, name: str, trouble: str) -> None:
        """Tell of trouble once, however many looks it lasts."""
        self._complaints.add((name, trouble))
        if (name, trouble) not in self._told:
            self._say(name, trouble)


def _with(state: State, active: Active | None) -> State:
    return dataclasses.replace(state, active=active)


def _seconds(time: float | None) -> str | None:
    return stamp(datetime.datetime.fromtimestamp(time, datetime.UTC)) if time else None
