"""Command line: ``python -m launch schedule add | list | history | run | remove | serve ...``."""

import argparse
import dataclasses
import datetime
import json
import secrets
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignrec.errors import UserError
from cluster import kubernetes
from cluster.checkout import RECIPES, recipe_path
from launch import recipe as recipes
from launch import runner
from launch.arguments import add_address, add_json, add_recipe
from launch.schedule import definition, listing, timetable
from launch.schedule.definition import Schedule
from launch.schedule.serving import Server
from launch.schedule.store import Folder, stamp
from launch.schedule.submitting import RayJobs

_LOOK_SECONDS = 5.0
_LONGEST_EVERY = 3600.0


def add_to(commands: Any) -> None:  # noqa: ANN401 - argparse's action of subparsers
    """Add ``schedule`` and what it can do to the command line."""
    schedule = commands.add_parser("schedule", help="run recipes by the clock")
    kinds = schedule.add_subparsers(required=True, metavar="ACTION")
    add = kinds.add_parser("add", help="add a schedule")
    add.add_argument("name", metavar="NAME", help="lower-case letters, digits and dashes")
    _add_definition(add)
    listing = kinds.add_parser("list", help="all schedules: next and last run")
    history = kinds.add_parser("history", help="what became of a schedule's times")
    ask = kinds.add_parser("run", help="have the server run a schedule now")
    remove = kinds.add_parser("remove", help="remove a schedule; a job of it goes on")
    serve = kinds.add_parser("serve", help="submit what is due, until SIGTERM or Ctrl-C")
    serve.add_argument(
        "--every", type=float, default=_LOOK_SECONDS, metavar="SECONDS", help="time between looks"
    )
    render = kinds.add_parser("render", help="print a manifest that runs it without this server")
    cron_job = render.add_subparsers(required=True, metavar="KIND").add_parser(
        "kubernetes", help="a CronJob whose pods submit to a cluster"
    )
    cron_job.add_argument("--image", required=True, help="image with the checkout and its packages")
    cron_job.add_argument(
        "--recipe-path",
        type=Path,
        metavar="PATH",
        help="where a recipe that is not in launch/recipes is in the image",
    )
    actions: tuple[tuple[argparse.ArgumentParser, Callable[..., int]], ...] = (
        (add, _add),
        (listing, _list),
        (history, _history),
        (ask, _ask),
        (remove, _remove),
        (serve, _serve),
        (cron_job, _render),
    )
    for action, function in actions:
        action.add_argument(
            "--folder", type=Path, help="folder of the schedules (default: ~/.alignrec/schedules)"
        )
        action.set_defaults(command=function)
    for action in (history, ask, remove, cron_job):
        action.add_argument("name", metavar="NAME")
    for action in (add, listing, history):
        add_json(action)


def _add_definition(add: argparse.ArgumentParser) -> None:
    add.add_argument(
        "--cron", required=True, help="minute hour day-of-month month day-of-week: '0 3 * * *'"
    )
    add.add_argument("--timezone", default="UTC", help="of --cron, as Europe/Berlin (default: UTC)")
    add_recipe(add)
    add_address(add)
    add.add_argument(
        "--on-overlap",
        choices=("skip", "queue"),
        default="skip",
        help="what becomes of a time at which the run before is not over (default: skip)",
    )
    add.add_argument(
        "--deadline",
        type=float,
        metavar="SECONDS",
        help="skip a run that could not begin until so long after its time (default: no limit)",
    )
    add.add_argument("--retries", type=int, default=0, help="attempts after a failure (default: 0)")
    add.add_argument(
        "--retry-wait",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="before the first of them; doubles with each, up to an hour (default: 60)",
    )
    add.add_argument(
        "--keep-history", type=int, default=100, metavar="N", help="entries kept (default: 100)"
    )
    add.add_argument("--replace", action="store_true", help="change the schedule of that name")


def _add(options: argparse.Namespace) -> int:
    folder = Folder(options.folder)
    exists = options.name in folder.names()
    if exists and not options.replace:
        raise UserError(
            f"{options.name}: there is a schedule of that name already. Change it with --replace, "
            f"or choose another name."
        )
    schedule = _definition(options)
    folder.write(schedule)
    following = schedule.following(_now())
    if options.json:
        print(json.dumps({"name": schedule.name, "next": following.isoformat()}))
        return 0
    print(
        f"{schedule.name} {'changed' if exists else 'added'}; it runs {_local(schedule, following)}"
    )
    _hint(f"artifacts will be in {schedule.run_dir}")
    if folder.server() is None:
        _hint(f"no server is up, so nothing runs yet: {_command('serve', options)}")
    return 0


def _definition(options: argparse.Namespace) -> Schedule:
    path = recipe_path(options.recipe)
    recipe = recipes.load(options.recipe, options.set)
    schedule = definition.build(
        {
            "name": options.name,
            "cron": options.cron,
            "timezone": options.timezone,
            "recipe": options.recipe if path.parent == RECIPES else str(path.absolute()),
            "assignments": options.set,
            "variables": recipe.variables(),
            "first": options.first,
            "last": options.last,
            "run_dir": (options.run_dir or Path("runs") / recipe.name).absolute(),
            "directory": Path.cwd(),
            "address": options.address,
            "on_overlap": options.on_overlap,
            "deadline": options.deadline,
            "retries": options.retries,
            "retry_wait": options.retry_wait,
            "keep_history": options.keep_history,
            "mark": secrets.token_hex(2),
            "added": stamp(_now()),
        }
    )
    runner.chosen_steps(recipe, schedule.selection)
    return schedule


def _list(options: argparse.Namespace) -> int:
    folder = Folder(options.folder)
    rows: list[dict[str, Any]] = []
    for name in folder.names():
        try:
            rows.append(listing.row(folder, folder.read(name), _now()))
        except (ValueError, OSError) as error:
            rows.append({"name": name, "error": str(error)})
    server = folder.server()
    if options.json:
        print(json.dumps({"folder": str(folder.path), "server": server, "schedules": rows}))
        return 0
    if not rows:
        print(f"no schedules in {folder.path}. Add one: python -m launch schedule add --help")
        return 0
    for row in rows:
        print("\n".join(listing.lines(row)))
    print(f"served by {server}" if server else f"NOT SERVED: {_command('serve', options)}")
    return 0


def _history(options: argparse.Namespace) -> int:
    folder = Folder(options.folder)
    schedule = folder.read(options.name)
    entries = folder.history(schedule.name)
    if options.json:
        print(json.dumps([dataclasses.asdict(entry) for entry in entries]))
        return 0
    if not entries:
        following = _local(schedule, schedule.following(_now()))
        print(f"{schedule.name} has not run yet; it runs {following}")
    for entry in entries:
        print(listing.entry_line(dataclasses.asdict(entry), schedule.timezone))
    return 0


def _ask(options: argparse.Namespace) -> int:
    folder = Folder(options.folder)
    schedule = folder.read(options.name)
    now = _now()
    folder.ask(schedule, now)
    print(schedule.job_id(now))
    if folder.server() is None:
        _hint(f"no server is up; it will be submitted by {_command('serve', options)}")
    return 0


def _remove(options: argparse.Namespace) -> int:
    folder = Folder(options.folder)
    if options.name not in folder.names():
        folder.read(options.name)  # says which names there are
    folder.remove(options.name)
    print(f"{options.name} removed with its history; a job of it that runs goes on")
    return 0


def _serve(options: argparse.Namespace) -> int:
    if not 0 < options.every <= _LONGEST_EVERY:
        raise UserError(
            f"--every {options.every:g} is no time between looks: times would come late or the "
            f"server never rest. Set 1 to {_LONGEST_EVERY:.0f} seconds."
        )
    folder = Folder(options.folder)
    stop = threading.Event()

    def end(number: int, frame: object) -> None:  # noqa: ARG001
        if stop.is_set():
            raise KeyboardInterrupt  # asked twice: not even the look is finished
        stop.set()

    with folder.served():
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, end)
        _show(
            f"serving {len(folder.names())} schedules of {folder.path}; Ctrl-C or SIGTERM ends it"
        )
        server = Server(folder, RayJobs(), clock=_now, show=_show)
        while not stop.is_set():
            server.look()
            stop.wait(options.every)
    _show("no longer serving; submitted jobs go on")
    return 0


def _render(options: argparse.Namespace) -> int:
    schedule = Folder(options.folder).read(options.name)
    if schedule.address is None:
        raise UserError(
            f"{schedule.name} has no --address, but a pod of a CronJob needs to know the cluster. "
            f"Add it again with --replace --address http://HOST:8265."
        )
    if schedule.on_overlap == "queue":
        raise UserError(
            f"{schedule.name} has --on-overlap queue, which no CronJob can do. Use skip, or have "
            f"it served: python -m launch schedule serve"
        )
    timetable.check_for_kubernetes(schedule.cron)
    recipe = _recipe_in_image(schedule, options.recipe_path)
    command = ["python", "-m", "launch", "submit", recipe, "--follow"]
    command += ["--address", schedule.address, "--run-dir", str(schedule.run_dir)]
    command += [*schedule.selection.options, *(f"--set={a}" for a in schedule.assignments)]
    text = kubernetes.render_cron(
        name=schedule.name,
        cron=schedule.cron,
        timezone=schedule.timezone,
        command=command,
        variables=schedule.variables | {"ALIGNREC_DIRECTORY": str(schedule.directory)},
        image=options.image,
        deadline_seconds=None if schedule.deadline is None else round(schedule.deadline),
        retries=schedule.retries,
        keep_history=schedule.keep_history,
    )
    print(text, end="")
    return 0


def _recipe_in_image(schedule: Schedule, path: Path | None) -> str:
    own = Path(schedule.recipe).is_absolute()
    if own and path is None:
        raise UserError(
            f"{schedule.recipe} is a file of this machine, which the image need not have. Say "
            f"where it is in the image: --recipe-path PATH"
        )
    if path is not None and not (own and path.is_absolute() and path.suffix in (".yaml", ".yml")):
        raise UserError(
            f"--recipe-path {path} is no place of {schedule.recipe} in the image. "
            + ("Give an absolute path that ends in .yaml." if own else "Leave it out.")
        )
    return str(path) if path else schedule.recipe


def _command(action: str, options: argparse.Namespace) -> str:
    folder = f" --folder {options.folder}" if options.folder else ""
    return f"python -m launch schedule {action}{folder}"


def _local(schedule: Schedule, time: datetime.datetime) -> str:
    return listing.in_zone(time.isoformat(), schedule.timezone)


def _now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC).replace(microsecond=0)


def _show(line: str) -> None:
    print(line, flush=True)


def _hint(line: str) -> None:
    print(line, file=sys.stderr)
