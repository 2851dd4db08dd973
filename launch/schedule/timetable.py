"""Times of a cron expression in a time zone (definition -> server, list).

Clock changes are treated as Debian's cron treats them. An expression that names its minutes and
hours runs once a day that it names: at the first minute after a time that the clock skips, and the
first time of one that comes twice. One whose minutes or hours start with ``*`` goes by elapsed
time: every hour that there is, once.
"""

import datetime
import re
import zoneinfo
from collections.abc import Iterator

from cronsim import CronSim, CronSimError

from alignrec.configuration import nearest
from alignrec.errors import UserError

_FIELDS = ("minute", "hour", "day-of-month", "month", "day-of-week")
_RANGES = ("0-59", "0-23", "1-31 or L", "1-12 or JAN-DEC", "0-7 or SUN-SAT")
_REACH = datetime.timedelta(days=366)


def check(cron: str, timezone: str) -> None:
    """Refuse an expression or a zone that no times can come of.

    Raises:
        UserError: naming the option, and the field of the expression.
    """
    zone = _zone(timezone)
    fields = cron.split()
    if len(fields) != len(_FIELDS):
        raise UserError(
            f"--cron {cron!r} has {len(fields)} fields, not five: {' '.join(_FIELDS)}. Every "
            f"night at three is '0 3 * * *'."
        )
    for field, name, valid in zip(fields, _FIELDS, _RANGES, strict=True):
        alone = " ".join(field if other == name else "*" for other in _FIELDS)
        if not _is_valid(alone):
            raise UserError(
                f"--cron {cron!r}: {field} is no {name}. Valid are {valid}, lists (1,3), ranges "
                f"(1-5), steps (*/2) and *."
            )
    if not _is_valid(cron) or next(_times(cron, zone, _now()), None) is None:
        raise UserError(
            f"--cron {cron!r} never comes: no such day is in those months. Correct "
            f"day-of-month or month."
        )


def check_for_kubernetes(cron: str) -> None:
    """Refuse what Kubernetes' CronJob does not read, or reads as other times (robfig/cron, v3).

    Raises:
        UserError: naming the field.
    """
    day, week = cron.upper().split()[2::2]
    trouble = ""
    if "L" in day or "L" in week or "#" in week:
        trouble = "L and # are forms of this server alone"
    elif "7" in re.findall(r"\d+", re.sub(r"/\d+", "", week)) or re.search(r"(^|,)\w+/", week):
        trouble = "its days of the week end at 6. Write 0 for Sunday, 1-6/2 for 1/2"
    elif "*" not in (day, week) and "*" in day + week:
        trouble = "it takes either of two limited days, also where one is made of *"
    if trouble:
        raise UserError(
            f"--cron {cron!r} cannot be a CronJob's: {trouble}. Change it with --replace, or have "
            f"it served: python -m launch schedule serve"
        )


def following(cron: str, timezone: str, after: datetime.datetime) -> datetime.datetime:
    """Return the first time after ``after``, in UTC."""
    return next(_times(cron, _zone(timezone), after))


def between(
    cron: str, timezone: str, after: datetime.datetime, until: datetime.datetime
) -> list[datetime.datetime]:
    """Return the times in (after, until] in UTC, at most those of the last year."""
    start = max(after, until - _REACH)
    found = []
    for time in _times(cron, _zone(timezone), start):
        if time > until:
            break
        found.append(time)
    return found


def _times(
    cron: str, zone: datetime.tzinfo, after: datetime.datetime
) -> Iterator[datetime.datetime]:
    last = after
    for local in CronSim(cron, after.astimezone(zone)):
        time = local.astimezone(datetime.UTC)
        # The library repeats a time for each that was skipped, and starts again in a repeated hour.
        if time > last:
            yield time
            last = time


def _is_valid(cron: str) -> bool:
    try:
        CronSim(cron, _now())
    except (CronSimError, AssertionError, TypeError, ValueError):  # some forms trip the library up
        return False
    return True


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        close = nearest(name, zoneinfo.available_timezones())
        hint = f"Did you mean {' or '.join(close)}?" if close else "Examples: UTC, Europe/Berlin."
        raise UserError(f"--timezone {name} is no time zone. {hint}") from None


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)
