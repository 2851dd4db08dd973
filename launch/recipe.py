"""A recipe, checked as a whole before anything runs (YAML and --set -> runner)."""

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.stage import Stage
from cluster.checkout import recipe_path
from cluster.config import ClusterConfig
from launch.stages import PROVIDERS, STAGES

CLUSTER = "cluster"


@dataclasses.dataclass(frozen=True)
class Step:
    """One stage of a recipe.

    Attributes:
        stage: which stage.
        config: its configuration, complete and checked.
        inputs: name of each input -> name of the stage of this recipe that makes it.
    """

    stage: Stage
    config: Any
    inputs: Mapping[str, str]

    @property
    def name(self) -> str:
        """Name of the stage, of its section and of its folder."""
        return self.stage.name

    @property
    def num_ranks(self) -> int:
        """Processes that run it together."""
        return int(getattr(self.config, "num_ranks", 1))


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Stages in the order in which they run, and where.

    Attributes:
        name: name of the run's default folder.
        steps: the stages whose sections the recipe has.
        cluster: section ``cluster``.
        sections: the sections as written, with --set applied, variables not yet replaced.
    """

    name: str
    steps: tuple[Step, ...]
    cluster: ClusterConfig
    sections: Mapping[str, Any]

    def resolved(self) -> dict[str, Any]:
        """Return every setting of every section, as a recipe that makes the same run."""
        sections = {CLUSTER: configuration.to_mapping(self.cluster)}
        return sections | {s.name: configuration.to_mapping(s.config) for s in self.steps}

    def variables(self) -> dict[str, str]:
        """Return the environment variables that it names, as far as they are set here."""
        names = configuration.variables(self.sections)
        return {name: os.environ[name] for name in sorted(names) if name in os.environ}

    def step(self, name: str, option: str) -> Step:
        """Return a stage by name.

        Raises:
            UserError: the recipe has no such stage; ``option`` says where the name came from.
        """
        known = [step.name for step in self.steps]
        if name not in known:
            close = configuration.nearest(name, known)
            hint = f"Did you mean {' or '.join(close)}?" if close else ""
            raise UserError(
                f"{option} {name}: recipe {self.name} has no such stage, only "
                f"{', '.join(known)}. {hint}".rstrip()
            )
        return self.steps[known.index(name)]


def load(
    source: str, assignments: Iterable[str] = (), *, stages: Sequence[Stage] = STAGES
) -> Recipe:
    """Read and check a recipe.

    Args:
        source: name of a file in launch/recipes, or path of a YAML file.
        assignments: ``section.key=value`` overrides.
        stages: the registry.

    Raises:
        UserError: anything in it that could not work.
    """
    path = recipe_path(source)
    sections = configuration.apply_assignments(configuration.load_yaml(path), assignments)
    return build(path.stem, sections, stages=stages)


def build(name: str, sections: Mapping[str, Any], *, stages: Sequence[Stage]) -> Recipe:
    """Check the sections and put the stages in order.

    Raises:
        UserError: an unknown section or setting, a wrong value, or an input that nothing makes.
    """
    known = [CLUSTER, *(stage.name for stage in stages)]
    for section in sections:
        if section not in known:
            close = configuration.nearest(str(section), known)
            hint = (
                f"Did you mean {' or '.join(close)}?"
                if close
                else f"Valid sections: {', '.join(known)}."
            )
            raise UserError(f"{section} is no section of a recipe, so it would do nothing. {hint}")
    written, sections = sections, configuration.expand_variables(sections)
    cluster = configuration.build(ClusterConfig, sections.get(CLUSTER), section=CLUSTER)
    chosen = [stage for stage in stages if stage.name in sections]
    if not chosen:
        raise UserError(
            f"recipe {name} has no section of a stage, so there is nothing to run. Stages: "
            f"{', '.join(known[1:])}."
        )
    made = {stage.name for stage in chosen}
    steps = tuple(
        Step(stage, stage.load_config(stage.section(sections)), _inputs(stage, made))
        for stage in chosen
    )
    return Recipe(name, steps, cluster, written)


def write(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe."""
    path.write_text(yaml.safe_dump(recipe.resolved(), sort_keys=False), encoding="utf-8")


def _inputs(stage: Stage, made: set[str]) -> dict[str, str]:
    inputs = {}
    for name in (*stage.inputs, *stage.optional_inputs):
        provider = PROVIDERS[name]
        if provider in made:
            inputs[name] = provider
        elif name in stage.inputs:
            raise UserError(
                f"{stage.name} needs {name}, which stage {provider} makes, but the recipe has no "
                f"section {provider}. Add it (empty for the defaults)."
            )
    return inputs
