"""What the documents promise: links lead somewhere, recipes are valid, commands are understood."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from alignrec.configuration import expand_variables, load_yaml, variables
from launch import recipe
from launch.stages import STAGES

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SECTIONS = {recipe.CLUSTER, *(stage.name for stage in STAGES)}


def names(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_recipes_in_the_documents_are_valid(page: Path) -> None:
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        if not isinstance(tree, dict) or not tree.keys() & SECTIONS:
            continue  # an excerpt of something else, e.g. a Kubernetes manifest
        for stage in STAGES:
            if stage.name in tree:
                stage.load_config(expand_variables(tree[stage.name]))
        assert tree.keys() <= SECTIONS


@pytest.mark.parametrize("page", PAGES, ids=names)
def test_modules_in_commands_exist(page: Path) -> None:
    for line in re.findall(r"python -m ([a-z_.]+)", page.read_text()):
        module = ROOT / line.replace(".", "/")
        assert module.is_dir() or module.with_suffix(".py").exists() or line == "torch", line


def test_settings_in_commands_exist() -> None:
    known = {stage.name: stage.load_config(_smallest(stage.name)) for stage in STAGES}
    for page in PAGES:
        for word in re.findall(r"--set ([a-z_]+\.[a-z_.]+)=", page.read_text()):
            section, *path = word.split(".")
            if section == "section":
                continue
            value = known[section]
            for part in path:
                assert hasattr(value, part), f"{names(page)}: {word}"
                value = getattr(value, part)


@pytest.mark.parametrize("path", sorted((ROOT / "launch/recipes").glob("*.yaml")), ids=names)
def test_every_recipe_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in variables(load_yaml(path)):
        monkeypatch.setenv(name, "somewhere")  # a recipe is checked without its data
    assert recipe.load(path.stem).steps
    assert load_yaml(path).keys() <= SECTIONS
    assert shlex.quote(path.stem) == path.stem  # its name needs no quotes in a shell


def _smallest(stage: str) -> dict[str, str]:
    return {"source": "synthetic"} if stage == "data_prep" else {}
