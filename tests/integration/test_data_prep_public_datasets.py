"""Public datasets through the command line, from their own files to a dataset: one Ray for all."""

import csv
import functools
import gzip
import http.server
import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from alignrec import artifacts, stage
from alignrec.data import schema
from alignrec.data.schema import SPLITS
from data_prep import STAGE, engine

pytestmark = pytest.mark.integration
NUM_ITEMS, NUM_USERS, NUM_PER_USER = 9, 6, 5
Section = dict[str, Any]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    section = {"source": "synthetic", "num_cpus": 2, "object_store_bytes": 100_000_000}
    with engine.session(STAGE.load_config(section)):
        yield


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Write no log."""


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve a picture of each item but the last, and return the address."""
    folder = tmp_path_factory.mktemp("served")
    for item in range(NUM_ITEMS - 1):
        (folder / f"{item}.jpg").write_bytes(draw(item))
    handler = functools.partial(_Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def draw(item: int) -> bytes:
    pixels = np.random.default_rng(item).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG")
    return buffer.getvalue()


def log() -> list[tuple[int, int, int]]:
    """Return (user, item, time); every item occurs."""
    rng = np.random.default_rng(0)
    return [
        (user, item, 1_000_000 + 100 * user + position)
        for user in range(NUM_USERS)
        for position, item in enumerate(rng.permutation(NUM_ITEMS)[:NUM_PER_USER].tolist())
    ]


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(path)


def write_csv(path: Path, rows: list[tuple[Any, ...]]) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return str(path)


def amazon_2014(folder: Path, address: str) -> Section:
    items = [
        {
            "asin": f"B{i:09d}",
            "title": f"It's item {i} &amp; more",
            "brand": "Acme",
            "categories": [["Baby", "Care"]],
            "imUrl": f"{address}/{i}.jpg",
        }
        for i in range(NUM_ITEMS)
    ]
    reviews = [
        {"reviewerID": f"U{u}", "asin": f"B{i:09d}", "overall": 4.0, "unixReviewTime": t}
        for u, i, t in log()
    ]
    return {
        "items": {"path": write_lines(folder / "meta_Baby.json.gz", list(map(repr, items)))},
        "interactions": {
            "path": write_lines(folder / "reviews_Baby_5.json.gz", list(map(json.dumps, reviews)))
        },
        "images": {"allowed_schemes": ["http"], "private_hosts": ["127.0.0.1"]},
    }


def amazon_2023(folder: Path, address: str) -> Section:
    items = [
        {
            "parent_asin": f"B{i:09d}",
            "title": f"It's item {i} &amp; more",
            "store": "Acme",
            "categories": ["Baby", "Care"],
            "features": [],
            "description": [],
            "images": [{"large": f"{address}/{i}.jpg", "variant": "MAIN"}],
        }
        for i in range(NUM_ITEMS)
    ]
    header = ("user_id", "parent_asin", "rating", "timestamp")
    reviews = [(f"U{u}", f"B{i:09d}", 4.0, t) for u, i, t in log()]
    return {
        "items": {"path": write_lines(folder / "meta_Baby.jsonl.gz", list(map(json.dumps, items)))},
        "interactions": {"path": write_csv(folder / "Baby.csv", [header, *reviews])},
        "images": {"allowed_schemes": ["http"], "private_hosts": ["127.0.0.1"]},
    }


def movielens(folder: Path, address: str) -> Section:
    (folder / "posters").mkdir()
    for item in range(NUM_ITEMS - 1):
        (folder / "posters" / f"{item}.jpg").write_bytes(draw(item))
    movies = "".join(f"{i}::Amélie {i} (2001)::Comedy|Romance\n" for i in range(NUM_ITEMS))
    (folder / "movies.dat").write_bytes(movies.encode("latin-1"))
    (folder / "ratings.dat").write_text("".join(f"{u}::{i}::5::{t}\n" for u, i, t in log()))
    return {
        "items": {"path": str(folder / "movies.dat")},
        "interactions": {"path": str(folder / "ratings.dat"), "min_rating": 4},
        "images": {"root": str(folder / "posters")},
    }


def hm(folder: Path, address: str) -> Section:
    keys = [f"0{600_000_000 + i}" for i in range(NUM_ITEMS)]
    (folder / "images" / "060").mkdir(parents=True)
    for item in range(NUM_ITEMS - 1):
        (folder / "images" / "060" / f"{keys[item]}.jpg").write_bytes(draw(item))
    names = ("article_id", "prod_name", "product_type_name", "colour_group_name",
             "department_name", "detail_desc")  # fmt: skip
    articles = [(key, f"Top {i}", "T-shirt", "Black", "Jersey", "Soft, light") for i, key in
                enumerate(keys)]  # fmt: skip
    header = ("t_dat", "customer_id", "article_id", "price", "sales_channel_id")
    days = [(f"2020-01-{1 + t % 28:02d}", f"U{u}", keys[i], 0.05, 2) for u, i, t in log()]
    return {
        "items": {"path": write_csv(folder / "articles.csv", [names, *articles])},
        "interactions": {"path": write_csv(folder / "transactions.csv", [header, *days])},
    }


def prepare(folder: Path, section: Section) -> int:
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({"data_prep": {**section, "max_bad_fraction": 0.2}}))
    return stage.main(STAGE, ["--output", str(folder / "out"), "--recipe", str(recipe)])


AMAZON_TEXT = "It's item 0 & more | Acme | Baby, Care"


@pytest.mark.parametrize(
    ("source", "write", "key", "text", "num_lost"),
    [
        ("amazon2014", amazon_2014, "B000000000", AMAZON_TEXT, 1),
        ("amazon2023", amazon_2023, "B000000000", AMAZON_TEXT, 1),
        ("movielens", movielens, "0", "Amélie 0 (2001) | Comedy, Romance", 0),
        ("hm", hm, "0600000000", "Top 0 | T-shirt | Black | Jersey | Soft, light", 1),
    ],
)
def test_a_public_dataset_becomes_a_dataset(
    source: str,
    write: Callable[[Path, str], Section],
    key: str,
    text: str,
    num_lost: int,
    pictures: str,
    local_ray: None,
    tmp_path: Path,
) -> None:
    section = {**write(tmp_path, pictures), "source": source}
    assert prepare(tmp_path, {**section, "split": {"strategy": "user_last_out"}}) == 0
    manifest = artifacts.verify(tmp_path / "out")
    counts = manifest.counts
    assert (counts["num_items"], counts["num_users"]) == (NUM_ITEMS, NUM_USERS)
    assert sum(counts[f"num_{split}"] for split in SPLITS) == NUM_USERS * NUM_PER_USER
    assert (counts["num_valid"], counts["num_test"]) == (NUM_USERS, NUM_USERS)
    assert counts["num_without_image"] == 1
    assert counts["num_quarantined"] == num_lost
    first = schema.read_items(tmp_path / "out").to_pylist()[0]
    assert (first["item_key"], first["text"], first["has_image"]) == (key, text, True)


def test_pictures_as_bytes_become_a_dataset(local_ray: None, tmp_path: Path) -> None:
    keys = [str(i) for i in range(NUM_ITEMS)]
    column = [{"bytes": draw(i), "path": f"{i}.jpg"} for i in range(NUM_ITEMS - 1)] + [None]
    pq.write_table(pa.table({"item_id": keys, "image": column}), tmp_path / "items.parquet")
    rows = [(f"U{u}", i) for u, i, _ in log()]
    section = {
        "items": {
            "path": str(tmp_path / "items.parquet"),
            "columns": {"title": None, "text": []},
        },
        "interactions": {"path": write_csv(tmp_path / "log.csv", [("user_id", "item_id"), *rows])},
    }
    assert prepare(tmp_path, section) == 0
    counts = artifacts.verify(tmp_path / "out").counts
    assert (counts["num_items"], counts["num_without_image"]) == (NUM_ITEMS, 1)
    assert counts["num_quarantined"] == 0
