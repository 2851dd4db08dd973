import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from alignrec import artifacts, stage
from alignrec.configuration import option
from alignrec.errors import StageFailure
from alignrec.stage import Context, Stage


@dataclasses.dataclass(frozen=True)
class Config:
    rows: int = option(2, "rows to write", minimum=0)
    workers: int = option(1, "processes", affects_result=False)


def run(config: Config, context: Context) -> None:
    if config.rows == 13:
        raise StageFailure("rank 1 of 2 died")
    with artifacts.writing(
        context.output,
        kind="graph",
        fingerprint=context.fingerprint,
        config=dataclasses.asdict(config),
        inputs=context.inputs,
    ) as draft:
        draft.counts["rows"] = config.rows


SAMPLE = Stage("sample", "graph", f"{__name__}:Config", f"{__name__}:run", inputs=("dataset",))
DATA = Stage("data", "dataset", f"{__name__}:Config", f"{__name__}:run")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    with artifacts.writing(
        tmp_path / "dataset", kind="dataset", fingerprint="d", config={}, inputs={}
    ) as draft:
        (draft.path / "a").write_text("a")
    return tmp_path / "dataset"


def test_a_stage_runs_from_the_command_line(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["--dataset", str(dataset), "--output", str(output), "--set", "sample.rows=5"]
    assert stage.main(SAMPLE, words) == 0
    assert artifacts.read(output, "graph").counts == {"rows": 5}
    assert artifacts.read(output).inputs["dataset"]["path"] == str(dataset)

    assert stage.main(SAMPLE, [*words[:-1], "sample.rows=-1"]) == 2
    assert "sample.rows=-1 is out of range" in capsys.readouterr().err
    assert stage.main(SAMPLE, [*words[:-1], "sample.rows=13"]) == 1
    assert capsys.readouterr().err == "failed: rank 1 of 2 died\n"
    assert stage.main(SAMPLE, [*words[:-1], "smple.rows=3"]) == 2
    assert "stage sample does not read" in capsys.readouterr().err
    (tmp_path / "recipe.yaml").write_text("sample: 5")
    assert stage.main(SAMPLE, [*words[:-2], "--recipe", str(tmp_path / "recipe.yaml")]) == 2
    assert "sample must be a section" in capsys.readouterr().err
    assert stage.main(SAMPLE, ["--dataset", str(tmp_path / "no"), *words[2:]]) == 2
    message = capsys.readouterr().err
    assert "no dataset here" in message
    assert message.count("\n") == 1


def test_a_scheduler_reads_the_last_line(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["--dataset", str(dataset), "--output", str(output), "--json", "--set"]

    def last_line(assignment: str) -> dict[str, Any]:
        stage.main(SAMPLE, [*words, assignment])
        told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert told.pop("seconds") >= 0
        return told

    done = {
        "state": "done", "exit_code": 0, "output": str(output), "version": None,
        "counts": {"rows": 5}, "quarantined": {}, "error": "",
    }  # fmt: skip
    assert last_line("sample.rows=5") == done
    failed = done | {"state": "failed", "exit_code": 1, "error": "rank 1 of 2 died", "counts": {}}
    assert last_line("sample.rows=13") == failed
    mistake = last_line("sample.rows=-1")
    assert (mistake["state"], mistake["exit_code"]) == ("mistake", 2)
    assert "out of range" in mistake["error"]


def test_what_nobody_foresaw_is_told_and_raised(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--dataset", str(dataset), "--output", str(tmp_path / "out"), "--json"]
    with pytest.raises(ZeroDivisionError):
        stage.main(dataclasses.replace(SAMPLE, run=f"{__name__}:divide"), words)
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (told["state"], told["exit_code"]) == ("failed", 1)
    assert told["error"] == "ZeroDivisionError: division by zero"


def divide(config: Config, context: Context) -> None:
    config.rows / (config.rows - config.rows)


def test_the_fingerprint_follows_settings_and_inputs(tmp_path: Path, dataset: Path) -> None:
    first = SAMPLE.fingerprint(Config(), {"dataset": dataset})
    assert first == SAMPLE.fingerprint(Config(workers=8), {"dataset": dataset})
    assert first != SAMPLE.fingerprint(Config(rows=3), {"dataset": dataset})
    assert first != dataclasses.replace(SAMPLE, version=2).fingerprint(
        Config(), {"dataset": dataset}
    )


@dataclasses.dataclass(frozen=True)
class GoingOn:
    start: Path = option(Path(), "artifact to go on from", affects_result=False)

    @property
    def goes_on_from(self) -> Path:
        return self.start

    def earlier(self) -> artifacts.Manifest | None:
        return artifacts.finished(self.start)


def go_on(config: GoingOn, context: Context) -> None:
    earlier = config.earlier()
    with artifacts.writing(
        context.output, kind="graph", fingerprint=context.fingerprint, config={}, inputs={}
    ) as draft:
        (draft.path / "a").write_text("again" if earlier else "first")
        if earlier:
            draft.facts[stage.EARLIER] = {"identity": earlier.identity}


CHAIN = Stage("chain", "graph", f"{__name__}:GoingOn", f"{__name__}:go_on")


def test_a_result_in_the_place_of_what_it_went_on_from_is_found_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    (tmp_path / "link").symlink_to(tmp_path)
    words = ["--output", str(output), "--set", f"chain.start={tmp_path / 'link' / 'out'}"]
    for said in ("", "finished already"):
        assert stage.main(CHAIN, words) == 0
        assert said in capsys.readouterr().out
        assert (output / "a").read_text() == "first"


def test_a_run_elsewhere_goes_on_from_a_result_of_the_same_settings(tmp_path: Path) -> None:
    start, output = tmp_path / "a", tmp_path / "b"
    for folder in (start, output):
        assert stage.main(CHAIN, ["--output", str(folder), "--set", f"chain.start={start}"]) == 0
    assert (output / "a").read_text() == "again"
    config = GoingOn(start)
    finished = artifacts.read(output).fingerprint
    assert finished == CHAIN.fingerprint(config, {}, output)
    assert finished != CHAIN.fingerprint(config, {}, start) == artifacts.read(start).fingerprint


def test_only_rank_0_moves_what_a_killed_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    words = ["--output", str(output), "--set", f"chain.start={output}"]
    draft = artifacts.open_draft(output, fingerprint=CHAIN.fingerprint(GoingOn(output), {}, output))
    artifacts.complete(
        draft,
        kind="graph",
        fingerprint=CHAIN.fingerprint(GoingOn(output), {}, output),
        config={},
        inputs={},
    )
    monkeypatch.setattr(stage, "_RECOVERY_SECONDS", 0)
    monkeypatch.setenv("RANK", "1")
    assert stage.main(CHAIN, words) == 1
    assert "rank 0 did not move" in capsys.readouterr().err
    assert not output.exists()
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        assert stage.main(CHAIN, words) == 0
