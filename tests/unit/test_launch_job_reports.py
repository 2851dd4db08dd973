"""Jobs as Ray tells of them: from which address, for how long, and why one ended."""

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from alignrec.errors import StageFailure
from alignrec.testing.processes import free_port
from launch import jobs as jobs_module
from launch.jobs import Jobs, NoAnswerError

RAY = "Job entrypoint command failed with exit code 1, last available logs (truncated):\n"


class Client:
    """Ray's job client, with one job whose message a test sets."""

    def __init__(self, message: str) -> None:
        self.details = SimpleNamespace(
            submission_id="a",
            status=SimpleNamespace(value="FAILED"),
            entrypoint="python -m launch run recipe.yaml",
            start_time=1_000,
            end_time=3_000,
            message=message,
            driver_exit_code=1,
        )

    def get_job_info(self, job_id: str) -> SimpleNamespace:
        return self.details


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (RAY + "align: running\nfailed: rank 1 died\n", "failed: rank 1 died"),
        (RAY + "error: early\nfailed: late\n  failed: not a report", "failed: late"),
        (RAY + "Traceback\nKeyError: 3", RAY.strip()),
        ("", ""),
    ],
)
def test_a_failed_job_says_why_in_one_line(
    message: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs.__new__(Jobs)
    monkeypatch.setattr(jobs, "address", "http://127.0.0.1:1", raising=False)
    monkeypatch.setattr(jobs, "_client", Client(message), raising=False)
    job = jobs.get("a")
    assert job.message == reason
    assert (job.is_over, job.code, job.started, job.ended) == (True, 1, 1.0, 3.0)


class Dashboard(http.server.ThreadingHTTPServer):
    """Answers like the job API of a cluster without jobs, whose version a test sets."""

    version: object = "2.60.0"

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        answer = {"ray_version": self.server.version} if "version" in self.path else []
        body = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dashboard]:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with mock.patch.dict(os.environ), Dashboard(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("variable", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"])
@pytest.mark.parametrize("other", ["http://127.0.0.1:{port}", "auto", "127.0.0.1:{port}"])
def test_the_address_that_was_given_counts(
    variable: str, other: str, dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = other.format(port=free_port())
    monkeypatch.setenv(variable, value)
    assert Jobs(dashboard.url).list() == []
    assert os.environ[variable] == value


@pytest.mark.parametrize("version", ["none of ours", None])
def test_what_is_no_job_api_is_one_line(version: object, dashboard: Dashboard) -> None:
    dashboard.version = version
    with pytest.raises(StageFailure, match=f"the cluster at {dashboard.url} failed"):
        Jobs(dashboard.url)


def test_a_host_that_says_nothing_is_not_waited_for(
    dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = Jobs(dashboard.url)
    monkeypatch.setattr(jobs_module, "_ANSWER_SECONDS", (1.0, 0.05))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(NoAnswerError, match="no Ray cluster answers"):
            Jobs(address)
        jobs._client._address = address
        for ask in (jobs.list, lambda: jobs.logs("a")):
            with pytest.raises(NoAnswerError):
                ask()
