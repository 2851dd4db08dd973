"""Settings of data preparation: mistakes are named, results and speed are told apart."""

import dataclasses
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignrec import configuration
from alignrec.errors import UserError
from alignrec.stage import ReadsSources
from data_prep import STAGE, adapters, addresses
from data_prep.config import DataPrepConfig
from data_prep.quarantine import Reason
from data_prep.sources import PUBLIC_SOURCES

TABLES = {"items": {"path": "i.parquet"}, "interactions": {"path": "l.parquet"}}


def load(**section: Any) -> DataPrepConfig:
    config: DataPrepConfig = STAGE.load_config(section)
    return config


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({}, "data_prep.items.path is required"),
        ({"items": {"path": "x"}}, "data_prep.interactions.path is required"),
        ({**TABLES, "itmes": {}}, "data_prep.itmes is not a setting.*Did you mean items"),
        ({**TABLES, "images": {"max_sid": 3}}, "data_prep.images.max_sid.*max_side"),
        ({**TABLES, "images": {"max_side": "big"}}, "images.max_side must be a whole number"),
        ({**TABLES, "max_bad_fraction": 2}, "max_bad_fraction=2.0 is out of range"),
        ({**TABLES, "source": "tabel"}, "Did you mean table"),
        ({**TABLES, "mmrec": {"interactions": "x"}}, "data_prep.mmrec has no effect"),
        ({**TABLES, "source": "synthetic"}, "have no effect with source: synthetic"),
        ({**TABLES, "split": {"strategy": "user_time"}}, "needs times"),
        ({**TABLES, "images": {"jpeg_quality": 99}}, "jpeg_quality=99 is above 95"),
        ({"source": "mmrec"}, "data_prep.mmrec.interactions is required"),
        ({"source": "amazon2023"}, "data_prep.items.path is required"),
        ({**TABLES, "source": "movielense"}, "Did you mean movielens"),
        (
            {**TABLES, "source": "hm", "items": {"path": "x", "columns": {"key": "article_id"}}},
            "data_prep.items.columns has no effect with source: hm",
        ),
        (
            {**TABLES, "source": "hm", "interactions": {"path": "x", "columns": {"rating": "r"}}},
            "data_prep.interactions.columns has no effect with source: hm",
        ),
        (
            {**TABLES, "source": "hm", "interactions": {"path": "x", "min_rating": 3}},
            "the log of source hm has none",
        ),
        (
            {"items": TABLES["items"], "interactions": {"path": "l", "min_rating": 3}},
            "min_rating needs ratings",
        ),
    ],
)
def test_mistakes_are_named(section: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(**section)


@pytest.mark.parametrize("source", sorted(PUBLIC_SOURCES))
def test_a_public_dataset_brings_its_columns(source: str) -> None:
    config = load(**TABLES, source=source, split={"strategy": "user_last_out"})
    assert config.items.columns == PUBLIC_SOURCES[source].items
    assert config.interactions.columns == PUBLIC_SOURCES[source].interactions
    assert dataclasses.replace(config, num_cpus=1).items == config.items
    again = load(**configuration.to_mapping(config))
    assert again == config  # the resolved recipe is a recipe
    formats = {PUBLIC_SOURCES[source].item_format, PUBLIC_SOURCES[source].interaction_format}
    assert formats - {""} <= adapters.READERS.keys()


@pytest.mark.parametrize(
    "address",
    [
        "http://ecx.images-amazon.com/images/I/51fAmVkTbyL._SY300_.jpg",
        "http://g-ecx.images-amazon.com/images/G/01/x-site/icons/no-img-sm._CB192198896_.gif",
        "https://images-na.ssl-images-amazon.com/images/I/31.jpg",
        "https://m.media-amazon.com/images/I/71i77AuI9xL._SL1500_.jpg",
    ],
)
def test_the_amazon_recipe_allows_the_hosts_of_its_pictures(address: str) -> None:
    root = Path(__file__).resolve().parents[2]
    tree = configuration.expand_variables(
        configuration.load_yaml(root / "launch/recipes/amazon.yaml")
    )
    config = load(**tree["data_prep"])
    assert config.items.path == "data/amazon/meta_Baby.json.gz"
    policy = addresses.Policy(config.images.allowed_schemes, config.images.allowed_hosts)
    assert addresses.parse(address, policy).host in address


def test_speed_settings_do_not_make_a_result_stale() -> None:
    plain = configuration.result_settings(load(**TABLES))
    faster = load(**TABLES, num_cpus=3, images={"read_threads": 2}, max_bad_fraction=0.5)
    assert configuration.result_settings(faster) == plain
    assert configuration.result_settings(load(**TABLES, images={"max_side": 99})) != plain


def test_changed_raw_files_change_the_identity(tmp_path: Path) -> None:
    section = {}
    for name in ("items", "interactions"):
        path = tmp_path / f"{name}.csv"
        path.write_text("a,b\n")
        section[name] = {"path": str(path)}
    config = load(**section)
    assert isinstance(config, ReadsSources)
    before = config.source_identity()
    assert config.source_identity() == before
    os.utime(tmp_path / "items.csv", (1, 1))
    assert config.source_identity() != before
    Path(tmp_path / "items.csv").unlink()
    with pytest.raises(UserError, match="no such file"):
        config.source_identity()


def test_the_recipes_of_the_documentation_are_valid() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "data_preparation.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
    sources = [load(**yaml.safe_load(block)["data_prep"]).source for block in blocks]
    assert sources == [
        "table", "synthetic", "table", "mmrec", "amazon2023", "movielens", "table",
    ]  # fmt: skip


def test_versions_that_could_not_work_are_refused() -> None:
    grows = load(**TABLES, versions={"root": "v"})
    assert configuration.result_settings(grows) == configuration.result_settings(
        load(**TABLES, versions={"root": "v", "keep": 9})
    )
    assert configuration.result_settings(grows) != configuration.result_settings(load(**TABLES))
    with pytest.raises(UserError, match=r"versions\.keep=3 has no effect"):
        load(**TABLES, versions={"keep": 3})
    with pytest.raises(UserError, match=r"root='s3://b/v' is no folder"):
        load(**TABLES, versions={"root": "s3://b/v"})
    with pytest.raises(UserError, match="keep=0 is out of range"):
        load(**TABLES, versions={"root": "v", "keep": 0})
    mmrec = {"interactions": "a.inter", "features": ["f.npy"]}
    with pytest.raises(UserError, match="no effect with source: mmrec"):
        load(source="mmrec", mmrec=mmrec, versions={"root": "v"})


def test_the_documentation_lists_every_reason() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "data_preparation.md").read_text()
    missing = [reason for reason in Reason if f"`{reason}`" not in text]
    assert missing == []
