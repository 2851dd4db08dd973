"""The production recipe: checked without its data, hardware or network; fit for a cluster."""

from pathlib import Path
from typing import Any

import pytest

from alignrec.configuration import load_yaml
from alignrec.errors import UserError
from cluster import kubernetes
from cluster.checkout import RECIPES
from data_prep.config import DataPrepConfig
from launch import recipe
from launch.recipe import Recipe

LOCATIONS = {
    "ALIGNREC_ITEMS": "s3://bucket/items/*.parquet",
    "ALIGNREC_LOG": "s3://bucket/log/*.parquet",
    "ALIGNREC_IMAGE_HOST": "images.example.com",
    "ALIGNREC_DATASETS": "/shared/datasets/shop",
    "ALIGNREC_EMBEDDINGS": "/shared/runs/weekly/align",
}


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> Recipe:
    def no_data(config: DataPrepConfig) -> str:
        raise AssertionError("checking a recipe must not look at its data")

    monkeypatch.setattr(DataPrepConfig, "source_identity", no_data)
    for name, value in LOCATIONS.items():
        monkeypatch.setenv(name, value)
    return recipe.load("production")


def section(made: Recipe, name: str) -> Any:
    return made.step(name, "test").config


def test_it_is_checked_as_a_whole(production: Recipe) -> None:
    data_prep, align = section(production, "data_prep"), section(production, "align")
    assert data_prep.versions.root == "/shared/datasets/shop"
    assert data_prep.images.allowed_hosts == ("images.example.com",)
    assert data_prep.split.strategy == "global_time"
    assert data_prep.interactions.duplicates == "first"  # a chain trains on no held-out pair
    assert align.mode == "sampled"
    assert str(align.initial.embeddings) == "/shared/runs/weekly/align"
    assert align.initial.optional  # the first run starts from nothing
    graph = section(production, "graph")
    assert graph.num_ranks == align.num_ranks
    assert graph.num_partitions % align.num_ranks == 0
    pretrain = section(production, "pretrain")
    assert pretrain.split_batch(pretrain.num_ranks) == (64, 2)
    assert production.resolved().keys() >= {"evaluation", "export", "cluster"}


def test_its_locations_travel_with_the_job(production: Recipe) -> None:
    assert production.variables() == LOCATIONS


@pytest.mark.parametrize("name", LOCATIONS)
def test_a_location_that_is_not_set_is_named(
    name: str, production: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(name)
    with pytest.raises(UserError, match=f"variable {name} is not set"):
        recipe.load("production")


def test_its_manifest_has_a_host_for_every_rank() -> None:
    sections = load_yaml(RECIPES / "production.yaml")
    assert kubernetes.most_ranks(sections) == 8


def test_it_names_no_location_of_its_own() -> None:
    text = Path(RECIPES / "production.yaml").read_text()
    rest = text[text.index("data_prep:") :]
    assert all(f"${{{name}}}" in rest for name in LOCATIONS)
    assert "://" not in rest
