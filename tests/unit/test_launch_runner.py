"""Runs of cheap stages in this process: what is reused, what runs again, what is refused."""

import contextlib
import dataclasses
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from alignrec import artifacts
from alignrec.configuration import option, to_mapping
from alignrec.errors import StageFailure, UserError
from alignrec.stage import Context, Stage
from cluster.config import ClusterConfig
from launch import recipe, run_directory, runner, summary
from launch.recipe import Recipe, Step
from launch.runner import Selection

KINDS = {"data_prep": "dataset", "align": "embeddings", "evaluation": "metrics"}


@dataclasses.dataclass(frozen=True)
class Settings:
    content: str = option("x", "what is written")
    noise: str = option("", "what is not", affects_result=False)
    how: str = option("well", "well, badly, killed or silently", affects_result=False)


def work(config: Settings, context: Context) -> None:
    name = context.output.name
    if config.how == "badly":
        raise StageFailure("it went badly")
    if config.how == "silently":
        return
    draft = artifacts.open_draft(context.output, fingerprint=context.fingerprint)
    done = draft.work / "half"
    resumed = done.exists()
    done.write_text("")
    if config.how == "killed":
        raise KeyboardInterrupt
    (draft.path / "content").write_text(config.content)
    if name == "evaluation":
        values = {"alignrec": 0.3, "ablation": 0.2, "popularity": 0.1}
        table = {model: {"test": {"recall@20": value}} for model, value in values.items()}
        (draft.path / "metrics.json").write_text(json.dumps(table))
        (draft.path / "report").mkdir(exist_ok=True)
        (draft.path / "report" / "index.html").write_text("")
    draft.counts |= {"num_items": 1234, "num_resumed": int(resumed)}
    artifacts.publish(
        draft,
        context.output,
        kind=KINDS[name],
        fingerprint=context.fingerprint,
        config=to_mapping(config),
        inputs=context.inputs,
    )


def stage(name: str, *inputs: str) -> Stage:
    here = "test_launch_runner"
    return Stage(name, KINDS[name], f"{here}:Settings", f"{here}:work", inputs)


FAKES = (stage("data_prep"), stage("align", "dataset"), stage("evaluation", "embeddings"))


class HereEngine:
    """Runs stages in this process and counts how often it was connected."""

    def __init__(self) -> None:
        self.connections = 0

    @contextlib.contextmanager
    def connected(self, config: ClusterConfig, *, num_ranks: int) -> Iterator[str]:
        self.connections += 1
        yield "this process"

    def run(self, step: Step, context: Context, **settings: Any) -> None:
        step.stage.load_run()(step.config, context)


class Project:
    """A run directory and what its runs said."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.said: list[str] = []
        self.engine = HereEngine()

    def recipe(self, **changes: dict[str, Any]) -> Recipe:
        sections: dict[str, Any] = {stage.name: changes.get(stage.name, {}) for stage in FAKES}
        return recipe.build("fake", sections, stages=FAKES)

    def run(
        self, first: str | None = None, last: str | None = None, **changes: dict[str, Any]
    ) -> list[runner.Result]:
        self.said = []
        self.engine = HereEngine()
        return runner.run(
            self.recipe(**changes),
            self.path,
            engine=self.engine,
            selection=Selection(first, last),
            show=self.said.append,
        )

    def states(
        self, first: str | None = None, last: str | None = None, **changes: dict[str, Any]
    ) -> list[str]:
        return [result.state for result in self.run(first, last, **changes)]


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "run")


def test_a_second_run_reuses_everything_without_an_engine(project: Project) -> None:
    assert project.states() == ["ran", "ran", "ran"]
    assert project.engine.connections == 1
    assert project.states() == ["reused", "reused", "reused"]
    assert project.engine.connections == 0
    assert any(line.startswith("align: reused, finished ") for line in project.said)


def test_a_changed_setting_runs_its_stage_and_what_follows(project: Project) -> None:
    project.run()
    assert project.states(align={"content": "y"}) == ["reused", "ran", "ran"]
    assert any("align: running again, its settings or inputs changed" in s for s in project.said)


def test_a_setting_of_speed_runs_nothing(project: Project) -> None:
    project.run()
    assert project.states(align={"noise": "much"}) == ["reused", "reused", "reused"]


def test_equal_bytes_make_later_stages_reusable(project: Project) -> None:
    """A stage that runs again and writes the same keeps everything after it right."""
    project.run()
    assert project.states(first="align") == ["reused", "ran", "reused"]


def test_until_stops_after_its_stage(project: Project) -> None:
    assert project.states(last="align") == ["ran", "ran"]
    assert not (project.path / "evaluation").exists()


def test_from_an_absent_stage_says_what_to_run(project: Project) -> None:
    with pytest.raises(UserError, match=r"needs the finished stage data_prep.*--from data_prep"):
        project.run(first="align")
    assert not (project.path / "recipe.yaml").exists()


def test_from_refuses_an_earlier_stage_of_other_settings(project: Project) -> None:
    project.run()
    with pytest.raises(UserError, match=r"data_prep in .* was made from other settings"):
        project.run(first="align", data_prep={"content": "z"})


def test_from_after_until_is_refused(project: Project) -> None:
    with pytest.raises(UserError, match="nothing would run"):
        project.run(first="evaluation", last="align")


def test_an_interrupted_stage_resumes(project: Project) -> None:
    with pytest.raises(KeyboardInterrupt):
        project.run(align={"how": "killed"})
    results = project.run()
    assert [result.state for result in results] == ["reused", "ran", "ran"]
    assert results[1].counts["num_resumed"] == 1
    assert "align: resuming where it was interrupted" in project.said


def test_a_failed_stage_ends_the_run(project: Project) -> None:
    with pytest.raises(StageFailure, match="it went badly"):
        project.run(align={"how": "badly"})
    assert not (project.path / "evaluation").exists()


def test_a_stage_that_writes_nothing_is_a_failure(project: Project) -> None:
    with pytest.raises(UserError, match="no embeddings here"):
        project.run(align={"how": "silently"})
    project.run()
    with pytest.raises(StageFailure, match="without writing"):
        project.run(align={"how": "silently", "content": "y"})


def test_the_run_is_recorded_before_it_starts(project: Project) -> None:
    with pytest.raises(StageFailure):
        project.run(data_prep={"how": "badly"})
    assert "how: badly" in (project.path / "recipe.yaml").read_text()
    facts = json.loads((project.path / "environment.json").read_text())
    assert {"commit", "packages", "python", "command", "started"} <= facts.keys()


def test_two_runs_at_once_are_refused_by_name(project: Project) -> None:
    with run_directory.locked(project.path):
        with pytest.raises(StageFailure) as caught:
            project.run()
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    assert project.states(last="data_prep") == ["ran"]


def test_the_summary_compares_the_models(project: Project) -> None:
    results = project.run()
    text = summary.as_text(results, project.path)
    assert "data_prep   ran" in text
    assert "1,234 items" in text
    assert "test recall@20: alignrec 0.3000, ablation 0.2000, popularity 0.1000" in text
    assert "alignrec against the same model without content: +50.0 %" in text
    assert "alignrec against popularity: +200.0 %" in text
    assert f"report: {project.path / 'evaluation' / 'report' / 'index.html'}" in text
    plain = json.loads(json.dumps(summary.as_json(results, project.path)))
    assert plain["metrics"]["alignrec"]["test"]["recall@20"] == 0.3
    assert [entry["state"] for entry in plain["stages"]] == ["ran", "ran", "ran"]


def test_a_summary_without_evaluation_has_no_metrics(project: Project) -> None:
    results = project.run(last="align")
    assert "recall" not in summary.as_text(results, project.path)
    assert summary.as_json(results, project.path)["metrics"] is None
