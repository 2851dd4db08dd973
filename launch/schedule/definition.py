"""What a schedule is: which recipe, when, where, what happens when it goes wrong (-> server)."""

import dataclasses
import datetime
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from alignrec import configuration
from alignrec.configuration import option
from alignrec.errors import UserError
from launch.jobs import check_address
from launch.runner import Selection
from launch.schedule import timetable

_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")
LONGEST_WAIT = datetime.timedelta(hours=1)
_YEAR_SECONDS = 366 * 86_400.0  # times before that are not made up for


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A recipe that runs by the clock."""

    name: str = option(help="lower-case letters, digits and dashes")
    cron: str = option(help="minute hour day-of-month month day-of-week")
    recipe: str = option(help="name of a recipe, or the absolute path of its file")
    run_dir: Path = option(help="absolute folder of its runs, the same for each")
    directory: Path = option(help="folder that relative paths of the recipe start from")
    mark: str = option(help="tells its jobs from those of a schedule of the same name elsewhere")
    added: str = option(help="when it was added; earlier times do not count")
    timezone: str = option("UTC", "time zone of cron")
    assignments: tuple[str, ...] = option((), "section.key=value overrides of the recipe")
    variables: dict[str, str] = option({}, "environment variables of the recipe, as when added")
    first: str | None = option(None, "stage that runs again each time; null: what is stale")
    last: str | None = option(None, "stage after which a run stops; null: the recipe's last")
    address: str | None = option(None, "job API; null: the cluster that is up on the machine")
    on_overlap: Literal["skip", "queue"] = option(
        "skip", "what becomes of a time at which the run before is not over"
    )
    deadline: float | None = option(
        None, "seconds by which a run may begin late; null: any", minimum=1, maximum=_YEAR_SECONDS
    )
    retries: int = option(0, "further attempts after a failure", minimum=0, maximum=20)
    retry_wait: float = option(
        60.0,
        "seconds before the first further attempt; they double with each, up to an hour",
        minimum=0,
        maximum=LONGEST_WAIT.total_seconds(),
    )
    keep_history: int = option(
        100, "entries of the history that are kept", minimum=1, maximum=100_000
    )

    def __post_init__(self) -> None:
        """Refuse what could not work.

        Raises:
            UserError: naming the option.
        """
        if not _NAME.fullmatch(self.name):
            raise UserError(
                f"{self.name!r} cannot name a schedule: jobs and files are named after it. Use up "
                f"to 40 lower-case letters, digits and, within, dashes."
            )
        timetable.check(self.cron, self.timezone)
        if self.address is not None:
            check_address(self.address)

    @property
    def selection(self) -> Selection:
        """Which part of the recipe runs."""
        return Selection(first=self.first, last=self.last)

    def job_id(self, time: datetime.datetime, *, attempt: int = 1) -> str:
        """Return the submission id of the run of a time: always the same one."""
        again = f"-{attempt}" if attempt > 1 else ""
        return f"{self.name}-{time:%Y%m%d-%H%M%S}-{self.mark}{again}"

    def is_too_late(self, time: datetime.datetime, now: datetime.datetime) -> bool:
        """Whether the run of a time may no longer begin."""
        return self.deadline is not None and (now - time).total_seconds() > self.deadline

    def wait_after(self, attempt: int) -> datetime.timedelta:
        """Return how long to wait after a failed attempt (1, 2, ...) before the next one."""
        seconds = self.retry_wait * 2.0 ** (attempt - 1)
        return min(datetime.timedelta(seconds=seconds), LONGEST_WAIT)

    def following(self, after: datetime.datetime) -> datetime.datetime:
        """Return its first time after ``after``, in UTC."""
        return timetable.following(self.cron, self.timezone, after)

    def between(
        self, after: datetime.datetime, until: datetime.datetime
    ) -> list[datetime.datetime]:
        """Return its times in (after, until], in UTC."""
        return timetable.between(self.cron, self.timezone, after, until)


def build(values: Mapping[str, Any]) -> Schedule:
    """Return a checked schedule.

    Raises:
        UserError: naming what is wrong.
    """
    return configuration.build(Schedule, values, section="schedule")
