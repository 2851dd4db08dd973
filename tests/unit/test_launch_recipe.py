"""Recipes: everything that could not work is refused before anything runs."""

import dataclasses
from pathlib import Path

import pytest

from alignrec.configuration import load_yaml, option
from alignrec.errors import UserError
from alignrec.stage import Stage
from cluster.checkout import packaged, recipe_path
from launch import recipe
from launch.stages import PROVIDERS, STAGES


@dataclasses.dataclass(frozen=True)
class Settings:
    size: int = option(3, "items")
    path: str = option("", "a file")


MAKE = Stage("data_prep", "dataset", "test_launch_recipe:Settings", "none:run")
TRAIN = Stage("align", "embeddings", "test_launch_recipe:Settings", "none:run", ("dataset",))
VARY = dataclasses.replace(TRAIN, name="ablation", inherits="align")
FAKES = (MAKE, TRAIN, VARY)


def write(tmp_path: Path, text: str) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return str(path)


def message(tmp_path: Path, text: str, *assignments: str) -> str:
    with pytest.raises(UserError) as caught:
        recipe.load(write(tmp_path, text), assignments, stages=FAKES)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_sections_choose_the_stages_and_their_order(tmp_path: Path) -> None:
    loaded = recipe.load(
        write(tmp_path, "align:\ndata_prep: {size: 5}\n"), ["align.size=7"], stages=FAKES
    )
    assert loaded.name == "mine"
    assert [step.name for step in loaded.steps] == ["data_prep", "align"]
    assert [step.config.size for step in loaded.steps] == [5, 7]
    assert loaded.steps[1].inputs == {"dataset": "data_prep"}


def test_an_ablation_starts_from_the_settings_of_its_stage(tmp_path: Path) -> None:
    text = "data_prep:\nalign: {size: 9, path: a}\nablation: {path: b}\n"
    loaded = recipe.load(write(tmp_path, text), stages=FAKES)
    assert loaded.steps[2].config == Settings(size=9, path="b")


def test_the_resolved_recipe_makes_the_same_run(tmp_path: Path) -> None:
    text = "data_prep: {size: 2}\nalign: {size: 9}\nablation: {path: b}\ncluster: {max_restarts: 5}"
    first = recipe.load(write(tmp_path, text), ["align.path=c"], stages=FAKES)
    recipe.write(first, tmp_path / "recipe.yaml")
    second = recipe.load(str(tmp_path / "recipe.yaml"), stages=FAKES)
    assert [step.config for step in second.steps] == [step.config for step in first.steps]
    assert second.cluster == first.cluster
    assert load_yaml(tmp_path / "recipe.yaml")["data_prep"] == {"size": 2, "path": ""}


def test_environment_variables_stand_in_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SOMEWHERE", "/data")
    text = 'data_prep: {path: "${SOMEWHERE}/a${NOWHERE:-/b}"}'
    loaded = recipe.load(write(tmp_path, text), stages=FAKES)
    assert loaded.steps[0].config.path == "/data/a/b"
    assert loaded.sections["data_prep"]["path"] == "${SOMEWHERE}/a${NOWHERE:-/b}"
    assert "NOWHERE is not set" in message(tmp_path, 'data_prep: {path: "${NOWHERE}"}')


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("algin: {size: 1}", "algin is no section of a recipe"),
        ("algin: {size: 1}", "Did you mean align"),
        ("data_prep: {sise: 1}", "Did you mean size?"),
        ("data_prep: {size: big}", "data_prep.size must be a whole number"),
        ("data_prep: 5", "data_prep must be a section"),
        ("data_prep:\nalign: 5\nablation:", "align must be a section"),
        ("cluster: {max_restart: 1}\ndata_prep:", "Did you mean max_restarts?"),
        ("align: {size: 1}", "align needs dataset, which stage data_prep makes"),
        ("cluster: {max_restarts: 1}", "there is nothing to run"),
        ("- 1", "not sections"),
        ("a: [", "is not valid YAML"),
    ],
)
def test_a_wrong_recipe_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    assert expected in message(tmp_path, text)


def test_assignments_are_checked_like_the_file(tmp_path: Path) -> None:
    assert "Did you mean size?" in message(tmp_path, "data_prep:", "data_prep.sizee=1")
    assert "section.key=value" in message(tmp_path, "data_prep:", "size")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("demmo", "Did you mean demo?"),
        ("nowhere/r.yaml", "no such recipe file"),
        ("gone.yaml", "no such recipe file"),
        ("xyzzy", "There are "),
    ],
)
def test_an_absent_recipe_is_named(name: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        recipe_path(name)


def test_a_stage_of_another_recipe_is_refused(tmp_path: Path) -> None:
    loaded = recipe.load(write(tmp_path, "data_prep:\nalign:"), stages=FAKES)
    with pytest.raises(UserError, match=r"--from alin: .* Did you mean align"):
        loaded.step("alin", "--from")


def test_every_input_has_an_earlier_stage() -> None:
    order = [stage.name for stage in STAGES]
    for stage in STAGES:
        for name in (*stage.inputs, *stage.optional_inputs):
            assert order.index(PROVIDERS[name]) < order.index(stage.name)


def test_a_job_ships_code_and_nothing_else() -> None:
    with packaged() as folder:
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} <= {".py", ".yaml", ".html", ".css", ".typed", ".js"}
        assert (folder / "launch" / "__main__.py").is_file()
        assert sum(path.stat().st_size for path in files) < 5_000_000
    assert not folder.exists()
