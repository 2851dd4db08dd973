"""Mistakes on the command line: one line on stderr, exit code 2, no Ray."""

import json
import sys
from pathlib import Path

import pytest
import yaml

import cluster.__main__ as cluster_command
import launch.__main__ as launch_command
from alignrec.testing.processes import free_port


@pytest.fixture(autouse=True)
def no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGNREC_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert launch_command.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    return error


def test_an_unknown_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean demo?" in mistake(capsys, "run", "demoo")


def test_an_unknown_setting_and_a_wrong_type(capsys: pytest.CaptureFixture[str]) -> None:
    error = mistake(capsys, "run", "demo", "--set", "align.learning_rat=1")
    assert "align.learning_rat is not a setting" in error
    assert "learning_rate" in error
    assert "must be a whole number" in mistake(capsys, "run", "demo", "--set", "align.seed=many")
    assert not Path("runs").exists()


def test_an_unknown_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean align" in mistake(capsys, "run", "demo", "--from", "alignn")
    assert "Did you mean graph" in mistake(capsys, "submit", "demo", "--until", "graf")


def test_from_without_the_stages_before(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--from data_prep" in mistake(capsys, "run", "demo", "--from", "align")


def test_a_program_reads_the_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_command.main(["run", "demo", "--from", "align", "--json"]) == 2
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert answer == {"state": "mistake", "exit_code": 2}


def test_no_cluster_is_up(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["status"], ["logs", "x"], ["stop", "x"], ["submit", "demo"]):
        assert "python -m cluster up" in mistake(capsys, *command)


def test_no_cluster_answers(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    error = mistake(capsys, "list", "--address", address)
    assert f"no Ray cluster answers at {address}" in error


@pytest.mark.parametrize("address", ["localhost:8265", "ray://head:10001", "auto", "http://"])
def test_an_address_of_another_kind(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["list"], ["submit", "demo"], ["logs", "x"]):
        assert "Write it as http://HOST:8265" in mistake(capsys, *command, "--address", address)


@pytest.mark.parametrize(
    "options",
    [
        ["up", "--hosts", "0"],
        ["up", "--num-cpus", "0"],
        ["up", "--object-store-mb", "10"],
        ["up", "--dashboard-port", "65536"],
        ["up", "--port", "-1"],
    ],
)
def test_sizes_that_no_cluster_can_have(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cluster_command.main(options) == 2
    error = capsys.readouterr().err
    assert f"{options[1]} {options[2]} is out of range" in error
    assert error.count("\n") == 1


def test_a_manifest_has_the_variables_and_a_name_that_kubernetes_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALIGNREC_LOG", "s3://bucket/log")
    command = ["render", "kubernetes", "production", "--image", "registry/alignrec:1"]
    command += ["--run-dir", "/data/runs/shop", "--volume-claim", "shared"]
    assert cluster_command.main(command) == 0
    manifest = yaml.safe_load(capsys.readouterr().out)
    assert manifest["metadata"]["name"] == "production"
    pod = manifest["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    assert {"name": "ALIGNREC_LOG", "value": "s3://bucket/log"} in pod["containers"][0]["env"]
    assert cluster_command.main([*command, "--name", "Shop.1"]) == 2
    assert "'Shop.1' cannot name a RayJob" in capsys.readouterr().err


def test_cluster_commands_without_a_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster_command.main(["status", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"up": False}
    assert cluster_command.main(["down"]) == 0
    assert "no cluster" in capsys.readouterr().out


def test_the_commands_are_documented() -> None:
    guide = (Path(launch_command.__file__).parents[1] / "docs" / "running.md").read_text()
    for command in ("run", "submit", "status", "logs", "stop", "list", "schedule"):
        assert f"python -m launch {command}" in guide
    for action in ("add", "list", "history", "run", "remove", "serve"):
        assert f"python -m launch schedule {action}" in guide
    assert sys.executable not in guide
