"""What the list and the history show of a schedule (store -> terminal, programs)."""

import dataclasses
import datetime
import zoneinfo
from typing import Any

from launch.schedule.definition import Schedule
from launch.schedule.store import Folder, moment


def row(folder: Folder, schedule: Schedule, now: datetime.datetime) -> dict[str, Any]:
    """Return what there is to say of a schedule as plain JSON values."""
    state = folder.state(schedule)
    history = folder.history(schedule.name)
    following = schedule.following(max(now, moment(state.decided)))
    return {
        "name": schedule.name,
        "cron": schedule.cron,
        "timezone": schedule.timezone,
        "recipe": schedule.recipe,
        "run_dir": str(schedule.run_dir),
        "next": following.isoformat(),
        "active": dataclasses.asdict(state.active) if state.active else None,
        "queued": state.queued,
        "last": dataclasses.asdict(history[-1]) if history else None,
    }


def lines(row: dict[str, Any]) -> list[str]:
    """Return such a row as people read it."""
    if "error" in row:
        return [f"{row['name']}: {row['error']}"]
    shown = [
        f"{row['name']}  '{row['cron']}' {row['timezone']}  {row['recipe']}",
        f"  next    {in_zone(row['next'], row['timezone'])}",
    ]
    active = row["active"]
    if active:
        shown.append(f"  now     {_active_line(active, row['timezone'])}")
    if row["queued"]:
        shown.append(f"  queued  {in_zone(row['queued'], row['timezone'])}")
    if row["last"]:
        shown.append(f"  last    {entry_line(row['last'], row['timezone'])}")
    return shown


def _active_line(active: dict[str, Any], timezone: str) -> str:
    attempt = f", attempt {active['attempt']}" if active["attempt"] > 1 else ""
    since = in_zone(active["since"], timezone)
    if active["phase"] == "waiting":
        return f"{active['job']} failed; attempt {active['attempt'] + 1} at {since}"
    if active["phase"] == "running":
        return f"{active['job']} running since {since}{attempt}"
    return f"{active['job']} about to be submitted{attempt}: {active['trouble']}".rstrip(": ")


def entry_line(entry: dict[str, Any], timezone: str) -> str:
    """Return an entry of the history as people read it."""
    code = "" if entry["exit_code"] is None else f" (exit code {entry['exit_code']})"
    reason = f": {entry['reason']}" if entry["reason"] else ""
    time = in_zone(entry["time"], timezone)
    job = "" if entry["outcome"] == "skipped" else f"  {entry['job']}"
    return f"{time}  {entry['outcome']}{code}{job}{reason}"


def in_zone(time: str, timezone: str) -> str:
    """Return a time as the clocks of a zone show it."""
    local = datetime.datetime.fromisoformat(time).astimezone(zoneinfo.ZoneInfo(timezone))
    return local.strftime("%Y-%m-%d %H:%M %Z")
