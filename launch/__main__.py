"""Command line: ``python -m launch run | submit | status | logs | stop | list | schedule``."""

import argparse
import datetime
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from alignrec.stage import exit_code
from launch import recipe as recipes
from launch import runner, summary
from launch.arguments import add_address, add_json, add_recipe
from launch.jobs import Job, Jobs
from launch.schedule import commands as schedule_commands

Command = Callable[[argparse.Namespace], int]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0 done, 1 the work failed, 2 the user's mistake, 130 interrupted.
    """
    options = _parser().parse_args(arguments)
    command: Command = options.command
    codes: list[int] = []
    try:
        failed = exit_code(lambda: codes.append(command(options)))
    except BrokenPipeError:  # as with `| head`: nobody reads on
        _mute()
        return 0
    if failed and getattr(options, "json", False):
        state = {1: "failed", 2: "mistake"}.get(failed, "interrupted")
        print(json.dumps({"state": state, "exit_code": failed}))
    return failed or codes[0]


def _run(options: argparse.Namespace) -> int:
    signal.signal(signal.SIGTERM, _interrupt)
    source = str(Path(options.recipe).absolute()) if Path(options.recipe).is_file() else None
    directory = os.environ.get("ALIGNREC_DIRECTORY")
    if directory and Path(directory).is_dir():
        os.chdir(directory)  # a job starts in its copy of the code; paths are relative to here
    recipe = recipes.load(source or options.recipe, options.set)
    run_dir = options.run_dir or Path("runs") / recipe.name
    results = runner.run(
        recipe,
        run_dir,
        engine=runner.RayEngine(),
        selection=runner.Selection(first=options.first, last=options.last),
        show=_show,
    )
    _show(summary.as_text(results, run_dir))
    if options.json:
        print(json.dumps(summary.as_json(results, run_dir)))
    return 0


def _show(line: str) -> None:
    """Print a line of a run, which goes on when nobody reads it any more."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        _mute()


def _mute() -> None:
    """Send what is still printed, the interpreter's last flush included, nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _submit(options: argparse.Namespace) -> int:
    recipe = recipes.load(options.recipe, options.set)
    run_dir = (options.run_dir or Path("runs") / recipe.name).absolute()
    selection = runner.Selection(first=options.first, last=options.last)
    runner.chosen_steps(recipe, selection)
    jobs = Jobs(options.address)
    job_id = jobs.submit(recipe, run_dir, selection.options, directory=_directory())
    if options.json:
        print(json.dumps({"id": job_id, "run_dir": str(run_dir), "address": jobs.address}))
    else:
        print(job_id, flush=True)
        there = _there(options)
        _hint(f"artifacts will be in {run_dir}")
        _hint(f"watch it:  python -m launch logs {job_id} --follow{there}")
        _hint(f"stop it:   python -m launch stop {job_id}{there}")
        _hint(f"dashboard: {jobs.address}")
    return _follow(jobs, job_id, options) if options.follow else 0


def _status(options: argparse.Namespace) -> int:
    jobs = Jobs(options.address)
    _print_jobs([jobs.get(options.id)] if options.id else jobs.list()[:1], options)
    return 0


def _list(options: argparse.Namespace) -> int:
    _print_jobs(Jobs(options.address).list(), options)
    return 0


def _logs(options: argparse.Namespace) -> int:
    jobs = Jobs(options.address)
    if options.follow:
        return _follow(jobs, options.id, options)
    print(jobs.logs(options.id), end="")
    return 0


def _follow(jobs: Jobs, job_id: str, options: argparse.Namespace) -> int:
    """Show what a job prints until it is over; return its exit code."""
    try:
        job = jobs.follow(job_id, lambda text: print(text, end="", flush=True))
    except KeyboardInterrupt:
        _hint(f"\nno longer watching; {job_id} goes on. Watch it again:")
        _hint(f"  python -m launch logs {job_id} --follow{_there(options)}")
        return 0
    _hint(f"{job.id} {job.status}" + (f": {job.message}" if job.code and job.message else ""))
    return job.code


def _stop(options: argparse.Namespace) -> int:
    jobs = Jobs(options.address)
    before = jobs.get(options.id)
    job = jobs.stop(options.id)
    if before.is_over:
        print(f"{job.id} was over already: {job.status}")
    else:
        print(f"{job.id} {job.status}; submitting the same run again continues it")
    return 0


def _print_jobs(jobs: Sequence[Job], options: argparse.Namespace) -> None:
    if options.json:
        fields = ("id", "status", "command", "started", "ended", "message", "exit_code")
        rows = [{name: getattr(job, name) for name in fields} for job in jobs]
        print(json.dumps(rows))
        return
    if not jobs:
        print("no job was submitted to this cluster yet: python -m launch submit RECIPE")
    for job in jobs:
        begun = _clock(job.started) if job.started else "not started"
        took = f", {job.ended - job.started:.0f} s" if job.started and job.ended else ""
        why = f": {job.message}" if job.status == "failed" and job.message else ""
        print(f"{job.id}  {job.status}  {begun}{took}{why}")


def _clock(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _directory() -> Path:
    """Return where relative paths of a recipe start: here, or where a manifest of ours says."""
    return Path(os.environ.get("ALIGNREC_DIRECTORY") or Path.cwd())


def _there(options: argparse.Namespace) -> str:
    """Return what a further command needs to reach the same cluster."""
    return f" --address {options.address}" if options.address else ""


def _hint(line: str) -> None:
    print(line, file=sys.stderr)


def _interrupt(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m launch",
        description="Run a recipe's stages here, or as a job of a Ray cluster.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a recipe and wait for it")
    add_recipe(run)
    add_json(run)
    run.set_defaults(command=_run)

    submit = commands.add_parser("submit", help="run a recipe as a job of a cluster")
    add_recipe(submit)
    add_address(submit)
    add_json(submit)
    submit.add_argument(
        "--follow",
        "-f",
        action="store_true",
        help="show what it prints until it is over; exit with its exit code",
    )
    submit.set_defaults(command=_submit)

    status = commands.add_parser("status", help="how a job is doing (default: the newest)")
    status.add_argument("id", nargs="?", metavar="ID")
    logs = commands.add_parser("logs", help="what a job printed")
    logs.add_argument("id", metavar="ID")
    logs.add_argument(
        "--follow", "-f", action="store_true", help="until it is over; exits with its exit code"
    )
    stop = commands.add_parser("stop", help="stop a job")
    stop.add_argument("id", metavar="ID")
    jobs = commands.add_parser("list", help="all jobs of a cluster")
    for command, function in ((status, _status), (logs, _logs), (stop, _stop), (jobs, _list)):
        add_address(command)
        command.set_defaults(command=function)
    for command in (status, jobs):
        add_json(command)
    schedule_commands.add_to(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
