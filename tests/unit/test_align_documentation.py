"""docs/alignment.md: the settings shown are the defaults, the recipes' sections are valid."""

import dataclasses
import re
from pathlib import Path

import yaml

from alignrec.align import STAGE

PAGE = Path(__file__).parents[2] / "docs" / "alignment.md"


def test_the_settings_shown_are_all_settings_with_their_defaults() -> None:
    shown, *_ = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert yaml.safe_load(shown)["align"] == dataclasses.asdict(STAGE.load_config({}))


def test_the_sections_for_recipes_are_valid() -> None:
    _, *sections = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(sections) == 5
    for section in sections:
        STAGE.load_config(yaml.safe_load(section)["align"])
