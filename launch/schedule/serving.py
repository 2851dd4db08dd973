"""The server of schedules: what is due is submitted, what is over is recorded (store -> cluster).

A look does what is due for each schedule and returns. What is about to be submitted is written down
before, under a submission id that follows from the schedule and the time alone: a server that was
killed at any moment submits it again, and the cluster refuses a second job of that id.
"""

import dataclasses
import datetime
from collections.abc import Callable

from alignrec.errors import StageFailure, UserError
from launch.jobs import Job, NoAnswerError
from launch.schedule.definition import Schedule
from launch.schedule.store import Active, Entry, Folder, Outcome, State, moment, stamp
from launch.schedule.submitting import Cluster

Time = datetime.datetime
_MISTAKE = 2  # exit code of a run that would fail the same way again
_RETRIED: tuple[Outcome, ...] = ("failed", "lost")


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
        self._complaints: dict[str, str] = {}

    def look(self) -> None:
        """Do what is due; trouble of one schedule does not touch the others."""
        for name in self._folder.names():
            try:
                self._advance(self._folder.read(name))
            except (UserError, StageFailure, OSError) as error:
                self._complain(name, error)

    def _advance(self, schedule: Schedule) -> None:
        state = self._folder.state(schedule)
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

    def _tend(self, schedule: Schedule, state: State, active: Active) -> State:
        """Bring the run under way further."""
        if active.phase == "running":
            return self._watch(schedule, state, active)
        if active.phase == "waiting":
            if self._clock() < moment(active.since):
                return state
            attempt = active.attempt + 1
            job = schedule.job_id(moment(active.time), attempt=attempt)
            again = Active(active.time, job, "submitting", self._stamp(), attempt)
            return self._submit(schedule, self._put(schedule, _with(state, again)))
        if self._is_outdated(schedule, state, active):
            return self._abandon(schedule, state, active)
        return self._submit(schedule, state)

    def _is_outdated(self, schedule: Schedule, state: State, active: Active) -> bool:
        """Whether a run that is not submitted yet should not begin any more."""
        if active.attempt > 1:
            return False
        now = self._clock()
        newer = schedule.following(moment(state.decided)) <= now
        return (bool(active.trouble) and newer) or schedule.is_too_late(moment(active.time), now)

    def _abandon(self, schedule: Schedule, state: State, active: Active) -> State:
        """Give a run up, unless the cluster has it after all."""
        reason = active.trouble or "no server was there"
        if self._find(schedule, active) is not None:
            running = dataclasses.replace(active, phase="running", trouble="")
            return self._put(schedule, _with(state, running))
        self._skip(schedule, moment(active.time), f"not submitted in time: {reason}")
        return self._put(schedule, _with(state, None))

    def _submit(self, schedule: Schedule, state: State) -> State:
        """Submit the run that is written down as about to be submitted, if there is one."""
        active = state.active
        if active is None or active.phase != "submitting":
            return state
        try:
            self._cluster.submit(schedule, active.job)
        except (NoAnswerError, StageFailure) as error:
            self._complain(schedule.name, error)
            return self._trouble(schedule, state, active, str(error))  # the next look tries again
        except UserError as error:
            entry = self._entry(active, "failed", exit_code=_MISTAKE, reason=str(error))
            self._record(schedule, entry)
            return self._put(schedule, _with(state, None))
        self._complaints.pop(schedule.name, None)
        self._say(schedule.name, f"submitted {active.job}")
        running = dataclasses.replace(active, phase="running", since=self._stamp(), trouble="")
        return self._put(schedule, _with(state, running))

    def _trouble(self, schedule: Schedule, state: State, active: Active, trouble: str) -> State:
        """Write down why a run is not submitted yet, for those who look at the list."""
        if active.trouble == trouble:
            return state
        troubled = dataclasses.replace(active, trouble=trouble)
        return self._put(schedule, _with(state, troubled))

    def _watch(self, schedule: Schedule, state: State, active: Active) -> State:
        """Record a run that is over, and arrange the next attempt where one is due."""
        job = self._find(schedule, active)
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
        self._say(
            schedule.name,
            f"attempt {active.attempt + 1} of {schedule.retries + 1} at {stamp(since)}",
        )
        waiting = dataclasses.replace(active, phase="waiting", since=stamp(since))
        return self._put(schedule, _with(state, waiting))

    def _find(self, schedule: Schedule, active: Active) -> Job | None:
        job = self._cluster.find(schedule, active.job)
        self._complaints.pop(schedule.name, None)
        return job

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
        late = (self._clock() - time).total_seconds()
        if schedule.is_too_late(time, self._clock()):
            self._skip(schedule, time, f"{late:.0f} s late, more than the {schedule.deadline:g} s")
            return state
        if state.active is None:
            job = schedule.job_id(time)
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

    def _complain(self, name: str, error: Exception) -> None:
        """Tell of trouble once, however often it is met."""
        if self._complaints.get(name) != str(error):
            self._complaints[name] = str(error)
            self._say(name, str(error))


def _with(state: State, active: Active | None) -> State:
    return dataclasses.replace(state, active=active)


def _seconds(time: float | None) -> str | None:
    return stamp(datetime.datetime.fromtimestamp(time, datetime.UTC)) if time else None
