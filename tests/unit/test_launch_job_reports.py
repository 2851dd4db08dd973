"""Jobs as Ray tells of them: the line that says why one ended."""

from types import SimpleNamespace

import pytest

from launch.jobs import Jobs

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
