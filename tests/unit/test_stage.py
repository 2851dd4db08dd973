import dataclasses
from pathlib import Path

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


def test_the_fingerprint_follows_settings_and_inputs(tmp_path: Path, dataset: Path) -> None:
    first = SAMPLE.fingerprint(Config(), {"dataset": dataset})
    assert first == SAMPLE.fingerprint(Config(workers=8), {"dataset": dataset})
    assert first != SAMPLE.fingerprint(Config(rows=3), {"dataset": dataset})
    assert first != dataclasses.replace(SAMPLE, version=2).fingerprint(
        Config(), {"dataset": dataset}
    )
