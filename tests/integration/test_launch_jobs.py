"""A cluster with dashboard and token: submit a recipe, watch it, stop it, schedule it, metrics."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from alignrec import artifacts
from alignrec.testing.processes import free_port

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
RECIPE = """
data_prep:
  source: synthetic
  synthetic: {num_items: 40, num_users: 30, image_size: 32}
"""


class Commands:
    """The command lines, with records, token and cluster of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.variables |= {
            "ALIGNREC_HOME": str(folder / "home"),
            "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
            "OMP_NUM_THREADS": "1",
            "RAY_metrics_report_interval_ms": "1000",
        }
        (folder / "tiny.yaml").write_text(RECIPE)

    def __call__(
        self, *arguments: str, code: int = 0, **variables: str
    ) -> subprocess.CompletedProcess[str]:
        result = subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=ROOT,
            env=self.variables | variables,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result

    @contextlib.contextmanager
    def served(self) -> Iterator[subprocess.Popen[str]]:
        """A schedule server for the length of the block."""
        with subprocess.Popen(
            [sys.executable, "-m", "launch", "schedule", "serve", "--every", "0.2"],
            cwd=ROOT,
            env=self.variables,
            text=True,
        ) as server:
            try:
                yield server
            finally:
                server.kill()

    def submit(self, run_dir: str, *assignments: str) -> str:
        options = [f"--set={assignment}" for assignment in assignments]
        recipe = str(self.folder / "tiny.yaml")
        run = str(self.folder / run_dir)
        return self("launch", "submit", recipe, "--run-dir", run, *options).stdout.strip()


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """Commands while their cluster is up; it goes down also when a test fails."""
    commands = Commands(tmp_path_factory.mktemp("jobs"))
    sizes = ["--num-cpus", "2", "--object-store-mb", "100"]
    try:
        commands("cluster", "up", "--dashboard-port", str(free_port()), *sizes)
        yield commands
    finally:
        record = commands.folder / "home" / "cluster.json"
        family = json.loads(record.read_text())["processes"] if record.exists() else []
        commands("cluster", "down")
        left = [p["pid"] for p in family if psutil.pid_exists(p["pid"])]
        alive = [pid for pid in left if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
        assert not alive, "processes of the cluster outlived it"


def until(condition: Callable[[], bool], seconds: float) -> bool:
    """Poll until a condition holds that other processes bring about."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def test_a_submitted_run_makes_what_a_local_run_makes(commands: Commands) -> None:
    job = commands.submit("submitted")
    followed = commands("launch", "logs", job, "--follow")
    assert "data_prep: done in" in followed.stdout
    assert f"{job} succeeded" in followed.stderr
    again = commands("launch", "logs", job)
    assert again.stdout == followed.stdout

    recipe, run_dir = str(commands.folder / "tiny.yaml"), str(commands.folder / "submitted")
    local = commands("launch", "run", recipe, "--run-dir", run_dir, "--json")
    report = json.loads(local.stdout.splitlines()[-1])
    assert [stage["state"] for stage in report["stages"]] == ["reused"]
    elsewhere = str(commands.folder / "local")
    commands("launch", "run", recipe, "--run-dir", elsewhere)
    submitted, direct = (
        artifacts.read(commands.folder / name / "data_prep") for name in ("submitted", "local")
    )
    assert submitted.identity == direct.identity
    assert bool(submitted.producer["commit"]) == bool(direct.producer["commit"])


def test_a_failed_job_hands_on_its_exit_code(commands: Commands) -> None:
    nowhere = [
        "data_prep.source=table",
        "data_prep.synthetic=null",
        "data_prep.items.path=/nowhere/items.parquet",
        "data_prep.interactions.path=/nowhere/log.parquet",
    ]
    recipe, run_dir = str(commands.folder / "tiny.yaml"), str(commands.folder / "missing")
    options = ["--run-dir", run_dir, "--follow", *(f"--set={word}" for word in nowhere)]
    followed = commands("launch", "submit", recipe, *options, code=2)
    job = followed.stdout.splitlines()[0]
    assert "error: /nowhere/items.parquet: no such file" in followed.stdout
    listed = json.loads(commands("launch", "status", job, "--json").stdout)
    assert [(entry["status"], entry["exit_code"]) for entry in listed] == [("failed", 2)]
    assert listed[0]["message"].startswith("error: /nowhere/items.parquet: no such file")


def test_a_running_job_shows_its_metrics_and_stops(commands: Commands) -> None:
    sizes = ["data_prep.synthetic.num_items=5000", "data_prep.shards.max_samples=10"]
    job = commands.submit("long", *sizes)
    nodes = json.loads(commands("cluster", "status", "--json").stdout)["nodes"]

    def has_metrics() -> bool:
        text = urllib.request.urlopen(nodes[0]["metrics"] + "/metrics", timeout=10).read().decode()
        return re.search(r'^ray_alignrec_data_prep_\w+{.*run="long".*} ', text, re.M) is not None

    seen = until(has_metrics, seconds=100)
    stopped = commands("launch", "stop", job)
    assert seen, commands("launch", "logs", job).stdout
    assert f"{job} stopped" in stopped.stdout
    commands("launch", "logs", job, "--follow", code=1)
    assert "over already" in commands("launch", "stop", job).stdout
    assert job in commands("launch", "list").stdout


def test_a_scheduled_run_is_submitted_once_though_its_server_is_killed(commands: Commands) -> None:
    folder = commands.folder / "home" / "schedules"
    recipe, run_dir = str(commands.folder / "tiny.yaml"), str(commands.folder / "scheduled")
    commands(
        "launch", "schedule", "add", "yearly", "--cron", "0 3 1 1 *", recipe, "--run-dir", run_dir
    )
    job = commands("launch", "schedule", "run", "yearly").stdout.strip()

    def state() -> dict[str, Any]:
        path = folder / "yearly.state.json"
        return json.loads(path.read_text()) if path.exists() else {"active": None}

    with commands.served() as server:
        assert until(lambda: (state()["active"] or {}).get("phase") == "running", seconds=60)
        server.kill()
    forgotten = state()
    forgotten["active"]["phase"] = "submitting"  # as if killed before it was written down
    (folder / "yearly.state.json").write_text(json.dumps(forgotten))
    with commands.served() as server:
        assert until((folder / "yearly.history.jsonl").exists, seconds=60)
        second = commands("launch", "schedule", "serve", code=1)
        assert f"are served by process {server.pid}" in second.stderr
        server.terminate()
        assert server.wait(timeout=60) == 0

    (entry,) = json.loads(commands("launch", "schedule", "history", "yearly", "--json").stdout)
    assert (entry["job"], entry["outcome"], entry["exit_code"]) == (job, "succeeded", 0)
    listed = json.loads(commands("launch", "list", "--json").stdout)
    assert [row["id"] for row in listed if row["id"].startswith("yearly-")] == [job]
    assert artifacts.read(Path(run_dir) / "data_prep").counts["num_items"] == 40


def test_mistakes_are_one_line(commands: Commands) -> None:
    unknown = commands("launch", "logs", "no-such-job", code=2)
    assert "has no such job" in unknown.stderr
    assert unknown.stderr.count("\n") == 1
    wrong = commands("launch", "list", code=2, RAY_AUTH_TOKEN="0" * 64)
    assert "refused the token" in wrong.stderr
    recipe, nowhere = str(commands.folder / "tiny.yaml"), f"127.0.0.1:{free_port()}"
    run = str(commands.folder / "absent")
    absent = commands("launch", "run", recipe, "--run-dir", run, code=2, RAY_ADDRESS=nowhere)
    assert f"no Ray cluster answers at {nowhere}" in absent.stderr
    second = commands("cluster", "up", code=2)
    assert "a cluster is up already" in second.stderr


def test_the_dashboard_asks_for_the_token(commands: Commands) -> None:
    status = json.loads(commands("cluster", "status", "--json").stdout)
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(status["dashboard_url"] + "/api/jobs/", timeout=10)
