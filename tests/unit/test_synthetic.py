import io
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from alignrec.testing import synthetic


@pytest.fixture(scope="module")
def catalogue() -> synthetic.Catalogue:
    return synthetic.make_catalogue(num_items=400, num_users=500, clicks_per_user=20, seed=3)


def test_equal_seeds_give_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        synthetic.write_catalogue(tmp_path / name, num_items=5, num_users=8, seed=1)
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) == 3 + 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_clicks_are_unique_and_follow_every_factor(catalogue: synthetic.Catalogue) -> None:
    pairs = catalogue.user * catalogue.num_items + catalogue.item
    assert len(np.unique(pairs)) == len(pairs)
    for factor in (catalogue.style, catalogue.topic, catalogue.circle):
        # Two clicks of one user share a value more often than two clicks of different users.
        value = factor[catalogue.item]
        same_user = catalogue.user[1:] == catalogue.user[:-1]
        own = (value[1:] == value[:-1])[same_user].mean()
        rng = np.random.default_rng(0)
        others = (value == value[rng.permutation(len(value))]).mean()
        assert own > 1.15 * others


def test_pictures_show_the_style_only(catalogue: synthetic.Catalogue) -> None:
    styles, colours = [], []
    for item in range(96):
        data = synthetic.draw_image(catalogue, item, size=32)
        assert data is not None
        pixels = np.asarray(Image.open(io.BytesIO(data)), dtype=float).reshape(-1, 3)
        assert pixels.shape == (32 * 32, 3)
        saturation = pixels.max(1) - pixels.min(1)
        colours.append(pixels[saturation.argsort()[-50:]].mean(0))
        styles.append(catalogue.style[item] % synthetic.NUM_COLOURS)
    colours_array, styles_array = np.array(colours), np.array(styles)
    centres = np.stack([colours_array[styles_array == s].mean(0) for s in range(6)])
    nearest = ((colours_array[:, None] - centres) ** 2).sum(-1).argmin(1)
    assert (nearest == styles_array).mean() > 0.8
    assert synthetic.draw_image(catalogue, 96) is None


def test_texts_show_the_topic_only(catalogue: synthetic.Catalogue) -> None:
    for item in range(88):
        words = set(synthetic.write_text(catalogue, item)["description"].lower().split())
        topic = synthetic.TOPICS[catalogue.topic[item]]
        own = set(synthetic._TOPICS[topic].split())
        assert len(own & {word.strip(".") for word in words}) >= 5
    assert not any(synthetic.write_text(catalogue, 88).values())


def test_the_raw_tables_have_the_documented_columns(tmp_path: Path) -> None:
    synthetic.write_catalogue(tmp_path, num_items=100, num_users=20, seed=0)
    items = pq.read_table(tmp_path / "items.parquet")
    assert items.column_names == ["item_id", "title", "brand", "categories", "description", "image"]
    assert items["image"].null_count == 1
    assert items["description"].null_count == 1
    log = pq.read_table(tmp_path / "interactions.parquet")
    assert log.column_names == ["user_id", "item_id", "timestamp"]
    assert set(log["item_id"].to_pylist()) <= set(items["item_id"].to_pylist())
