"""Runs as jobs of a Ray cluster: submit, watch, stop (command line -> Ray's job API)."""

import contextlib
import dataclasses
import datetime
import logging
import re
import secrets
import shlex
import time
import urllib.parse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignrec import artifacts, configuration
from alignrec.errors import StageFailure, UserError
from alignrec.ray_token import token_path
from cluster import checkout, environment, state
from launch.recipe import Recipe

RECIPE_FILE = "recipe.yaml"
_ADDRESS = re.compile(r"https?://[^\s/]+(/\S*)?")
_REPORT = re.compile(r"^(?:error|failed): .*$", re.MULTILINE)  # as the command line reports
_POLL_SECONDS = 1.0
_SILENCE_SECONDS = 60.0
_STOP_SECONDS = 60.0
_ANSWER_SECONDS = (5.0, 60.0)  # to connect, and between two pieces of an answer
# Ray prefers these to the address that its client is given.
_OTHER_ADDRESSES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")


@dataclasses.dataclass(frozen=True)
class Job:
    """A submitted run.

    Attributes:
        id: its submission id.
        status: pending, running, succeeded, failed or stopped.
        command: what it runs.
        started: unix seconds; None before it started.
        ended: unix seconds; None before it ended.
        message: what it says of its end, else what Ray says of it.
        exit_code: of its command; None before it ended or when it was killed.
    """

    id: str
    status: str
    command: str
    started: float | None
    ended: float | None
    message: str
    exit_code: int | None

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come of it."""
        return self.status in ("succeeded", "failed", "stopped")

    @property
    def code(self) -> int:
        """Exit code for a command that waited for it: the run's own, 1 when it was stopped."""
        if self.status == "succeeded":
            return 0
        return self.exit_code if self.exit_code in (1, 2) else 1


class Jobs:
    """The jobs of one cluster.

    Raises:
        NoAnswerError: no cluster answers at the address.
        RefusedError: it does not accept the token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = check_address(address) if address else _default_address()
        environment.prepare(loopback=True)
        logging.getLogger("ray").setLevel(logging.WARNING)  # no lines about the upload
        with self._explained(), environment.changed(dict.fromkeys(_OTHER_ADDRESSES)):
            self._client = _client(self.address)

    def submit(
        self,
        recipe: Recipe,
        run_dir: Path,
        options: Sequence[str] = (),
        *,
        job_id: str | None = None,
        directory: Path,
    ) -> str:
        """Start a run on the cluster and return its submission id.

        The job carries the recipe and this checkout's code; the run directory and the data must be
        where the cluster sees them under the same paths.

        Args:
            recipe: checked recipe.
            run_dir: absolute folder of the run.
            options: further options of ``launch run``.
            job_id: its submission id; None for a new one.
            directory: where relative paths of the recipe start.

        Raises:
            JobExistsError: the cluster has a job of that id already.
        """
        job_id = job_id or _new_id(recipe)
        variables = _variables(job_id, directory, recipe)
        command = ["python", "-m", "launch", "run", RECIPE_FILE, "--run-dir", str(run_dir)]
        with checkout.packaged() as folder, self._explained():
            text = yaml.safe_dump(dict(recipe.sections), sort_keys=False)
            (folder / RECIPE_FILE).write_text(text, encoding="utf-8")
            self._client.submit_job(
                entrypoint=shlex.join([*command, *options]),
                submission_id=job_id,
                runtime_env={"working_dir": str(folder), "env_vars": variables},
                metadata={"recipe": recipe.name, "run_dir": str(run_dir)},
            )
        return job_id

    def list(self) -> list[Job]:
        """Return all jobs, newest first."""
        with self._explained():
            found = [_job(job) for job in self._client.list_jobs() if job.submission_id]
        return sorted(found, key=lambda job: job.started or float("inf"), reverse=True)

    def get(self, job_id: str) -> Job:
        """Return one job.

        Raises:
            UserError: the cluster has no such job.
        """
        with self._explained(job_id):
            return _job(self._client.get_job_info(job_id))

    def logs(self, job_id: str) -> str:
        """Return what the job has printed so far."""
        with self._explained(job_id):
            return str(self._client.get_job_logs(job_id))

    def follow(self, job_id: str, show: Callable[[str], None]) -> Job:
        """Show what a job prints until it is over, and return how it ended.

        The log is read again and again from the job API: Ray's own tail can end before the job.

        Raises:
            UserError: the cluster has no such job.
            StageFailure: the cluster was silent for a minute.
        """
        shown = 0
        job = self.get(job_id)
        heard = time.monotonic()
        while True:
            try:
                job = self.get(job_id)
                text = self.logs(job_id)
                heard = time.monotonic()
            except NoAnswerError as error:
                if time.monotonic() - heard > _SILENCE_SECONDS:
                    raise StageFailure(
                        f"the cluster at {self.address} has been silent for "
                        f"{_SILENCE_SECONDS:.0f} s; what became of {job_id} is unknown."
                    ) from error
                text = ""
            if len(text) > shown:
                show(text[shown:])
                shown = len(text)
            if job.is_over:
                return job
            time.sleep(max(_POLL_SECONDS, shown / 1e6))

    def stop(self, job_id: str) -> Job:
        """Stop a job and wait until it is over.

        Raises:
            UserError: the cluster has no such job.
            StageFailure: it does not end.
        """
        job = self.get(job_id)
        deadline = time.monotonic() + _STOP_SECONDS
        while not job.is_over:
            if time.monotonic() > deadline:
                raise StageFailure(
                    f"{job_id} is still {job.status} {_STOP_SECONDS:.0f} s after it was told to "
                    f"stop. Look at the cluster: python -m cluster status"
                )
            with self._explained(job_id):
                self._client.stop_job(job_id)  # again and again: a pending job ignores it
            time.sleep(_POLL_SECONDS)
            job = self.get(job_id)
        return job

    @contextlib.contextmanager
    def _explained(self, job_id: str | None = None) -> Iterator[None]:
        """Turn the client's exceptions into one line that says what to do."""
        from ray.exceptions import AuthenticationError

        try:
            yield
        except AuthenticationError as error:
            raise RefusedError(
                f"the cluster at {self.address} refused the token. Put the cluster's token into "
                f"{token_path()} or RAY_AUTH_TOKEN (there: ray get-auth-token)."
            ) from error
        except OSError as error:  # requests' connection errors are among them
            raise NoAnswerError(
                f"no Ray cluster answers at {self.address}. Start one (python -m cluster up) or "
                f"correct --address."
            ) from error
        except (RuntimeError, ValueError, KeyError) as error:  # whatever answered
            if job_id is not None and "404" in str(error):
                raise UnknownJobError(self._unknown(job_id)) from error
            if "already exists" in str(error):
                raise JobExistsError(
                    f"the cluster at {self.address} has a job of that id already."
                ) from error
            raise StageFailure(f"the cluster at {self.address} failed: {_first(error)}") from error

    def _unknown(self, job_id: str) -> str:
        known = [job.id for job in self.list()]
        close = configuration.nearest(job_id, known)
        hint = f"Did you mean {close[0]}? " if close else ""
        return f"{job_id}: the cluster at {self.address} has no such job. {hint}See launch list."


class NoAnswerError(UserError):
    """Nobody answers at the address of the cluster."""


class RefusedError(UserError):
    """The cluster does not accept our token."""


class UnknownJobError(UserError):
    """The cluster has no job of that id."""


class JobExistsError(UserError):
    """The cluster has a job of that id already."""


def _client(address: str) -> Any:  # noqa: ANN401 - ray.job_submission.JobSubmissionClient
    from ray.job_submission import JobSubmissionClient

    class Client(JobSubmissionClient):  # type: ignore[misc]  # ray has no types
        """Ray's client, which would wait for an answer for ever."""

        def _do_request(self, *arguments: Any, **options: Any) -> Any:  # noqa: ANN401
            options.setdefault("timeout", _ANSWER_SECONDS)
            return super()._do_request(*arguments, **options)

    return Client(address)


def _job(details: Any) -> Job:  # noqa: ANN401 - ray.job_submission.JobDetails
    return Job(
        id=details.submission_id,
        status=str(details.status.value).lower(),
        command=details.entrypoint,
        started=details.start_time / 1000 if details.start_time else None,
        ended=details.end_time / 1000 if details.end_time else None,
        message=_reason(details.message or ""),
        exit_code=details.driver_exit_code,
    )


def check_address(address: str) -> str:
    """Return the address of a job API if it has the form of one.

    Raises:
        UserError: it has not; Ray would take it for something else.
    """
    if not _ADDRESS.fullmatch(address) or not _has_host(address):
        raise UserError(
            f"--address {address} is no address of a job API. Write it as http://HOST:8265, the "
            f"address of the cluster's dashboard."
        )
    return address


def _has_host(address: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(address)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:  # [::1 without its end, a port that is no number
        return False


def _default_address() -> str:
    record = state.alive()
    if record is None:
        raise NoAnswerError(
            "no cluster is up on this machine. Start one (python -m cluster up), or say where one "
            "is: --address http://HOST:8265"
        )
    return record.dashboard_url


def _new_id(recipe: Recipe) -> str:
    when = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return f"{recipe.name}-{when}-{secrets.token_hex(2)}"


def _variables(job_id: str, directory: Path, recipe: Recipe) -> dict[str, str]:
    """Return the environment of a job.

    Relative paths mean the same as here, if it can see them, and so do the variables of the recipe.
    """
    variables = {
        "ALIGNREC_DIRECTORY": str(directory),
        "ALIGNREC_JOB": job_id,
        "PYTHONUNBUFFERED": "1",
    }
    commit = artifacts.producer()["commit"]
    variables |= {"ALIGNREC_COMMIT": commit} if commit else {}
    return variables | recipe.variables()


def _reason(message: str) -> str:
    """Return the line of a job's last output that says why it ended, else Ray's own first line."""
    said = _REPORT.findall(message)
    return said[-1].strip() if said else _first(message)


def _first(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else ""
