"""Warm start and cold items: what rows start from, and whose catalogue they belong to."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from alignrec import artifacts
from alignrec.align import STAGE, catalogue
from alignrec.align.cold import fill_cold
from alignrec.align.initial import Earlier, take_over
from alignrec.errors import UserError
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType

NUM_USERS, NUM_ITEMS, DIM = 5, 6, 3
KNOWN = {USER: 3, ITEM: 4}
# user x item and item x item; user 4 and item 5 have nobody.
RATED = torch.tensor(
    [[1.0, 1, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0], [1, 0, 0, 0, 1, 0], [0, 0, 2, 0, 1, 0], [0.0] * 6]
)
LIKE = torch.zeros(NUM_ITEMS, NUM_ITEMS)
LIKE[4, 1], LIKE[4, 3], LIKE[1, 4], LIKE[3, 4], LIKE[2, 3] = 3.0, 1.0, 3.0, 1.0, 2.0


@pytest.fixture
def earlier(tmp_path: Path) -> Earlier:
    path = tmp_path / "model.safetensors"
    generator = torch.Generator().manual_seed(0)
    rows = {name: torch.randn(n, DIM, generator=generator) for name, n in KNOWN.items()}
    save_file(rows, path)
    manifest = artifacts.Manifest("embeddings", "", "", {}, {}, {}, {}, {}, {}, "")
    return Earlier(path, manifest, KNOWN, None)


def pull(edges: EdgeType, source: Tensor) -> Tensor:
    return {SIMILAR: LIKE, REV_RATES: RATED, RATES: RATED.T}[edges] @ source


def started(earlier: Earlier, *, content: bool) -> dict[str, Tensor]:
    tables = {USER: torch.full((NUM_USERS, DIM), 7.0), ITEM: torch.full((NUM_ITEMS, DIM), 9.0)}
    ids = {USER: torch.arange(NUM_USERS), ITEM: torch.arange(NUM_ITEMS)}
    take_over(earlier, tables, ids, pull, content=content)
    return tables


def test_known_rows_are_taken_over_as_they_are(earlier: Earlier) -> None:
    tables = started(earlier, content=True)
    for name, table in tables.items():
        ids = torch.arange(KNOWN[name])
        assert torch.equal(table[: KNOWN[name]], earlier.rows(name, ids))


def test_a_new_item_starts_between_its_similar_items_and_a_new_user_between_its_items(
    earlier: Earlier,
) -> None:
    tables = started(earlier, content=True)
    item = tables[ITEM]
    torch.testing.assert_close(item[4], (3 * item[1] + item[3]) / 4)
    torch.testing.assert_close(tables[USER][3], (2 * item[2] + item[4]) / 3)


def test_without_content_a_new_item_starts_between_its_users(earlier: Earlier) -> None:
    tables = started(earlier, content=False)
    torch.testing.assert_close(tables[ITEM][4], tables[USER][2])


def test_who_has_no_neighbours_keeps_the_row_that_was_drawn(earlier: Earlier) -> None:
    tables = started(earlier, content=True)
    assert torch.equal(tables[USER][4], torch.full((DIM,), 7.0))
    assert torch.equal(tables[ITEM][5], torch.full((DIM,), 9.0))


def test_a_cold_item_has_the_mean_direction_and_length_of_its_similar_warm_items() -> None:
    h_id = torch.tensor([[1.0, 0], [0, 4], [5, 5], [6, 6]])
    similar = torch.tensor([[0.0, 1, 0, 1], [1, 0, 0, 0], [3, 1, 0, 9], [0, 0, 1, 0]])
    cold = torch.tensor([False, False, True, True])
    filled = fill_cold(h_id, cold, similar.matmul)
    assert torch.equal(filled[:2], h_id[:2])
    torch.testing.assert_close(filled[2].norm(), torch.tensor((3 * 1 + 1 * 4) / 4))
    torch.testing.assert_close(filled[2] / filled[2].norm(), torch.tensor([0.6, 0.8]))
    assert filled[3].tolist() == [0, 0]  # its only similar item is cold as well


def write_keys(folder: Path, keys: list[str], rows_per_group: int) -> Path:
    folder.mkdir(exist_ok=True)
    for table in catalogue.TABLES:
        content = pa.table({f"{table}_key": keys})
        pq.write_table(content, folder / f"{table}s.parquet", row_group_size=rows_per_group)
    return folder


def test_the_digest_of_the_first_keys_depends_on_these_keys_and_their_borders_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_BLOCK_ROWS", 3)
    keys = ["a", "bc", "", "d é", "e", "ff", "g"]
    small = write_keys(tmp_path / "small", keys, 7)
    grown = write_keys(tmp_path / "grown", [*keys, "h", "i"], 2)
    moved = write_keys(tmp_path / "moved", ["ab", "c", *keys[2:]], 7)
    counts: dict[catalogue.Table, int] = {"item": 7, "user": 4}
    assert catalogue.digests(small, counts) == catalogue.digests(grown, counts)
    assert catalogue.digests(small, counts) != catalogue.digests(moved, counts)
    whole = catalogue.key_digest(grown, "item", num_rows=9)
    assert whole != catalogue.key_digest(grown, "item", num_rows=8)


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        ({"initial": {"optional": True}}, r"initial\.optional=True has no effect"),
        ({"initial": {"learning_rate_factor": 0.5}}, "learning_rate_factor=0.5 has no effect"),
        ({"initial": {"embeddings": "x"}, "paper_compatible": True}, "cannot go on from"),
        ({"cold_items": "similar", "content": False}, "needs the item-item graph"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, object], fault: str
) -> None:
    with pytest.raises(UserError, match=fault):
        STAGE.load_config(settings)


def test_cold_items_are_filled_by_default_where_there_is_content_and_the_paper_leaves_it_open() -> (
    None
):
    assert STAGE.load_config({}).cold_from_similar
    assert not STAGE.load_config({"cold_items": "own"}).cold_from_similar
    assert not STAGE.load_config({"content": False}).cold_from_similar
    assert not STAGE.load_config({"paper_compatible": True}).cold_from_similar
    assert STAGE.load_config({"paper_compatible": True, "cold_items": "similar"}).cold_from_similar


def test_a_run_that_goes_on_has_a_learning_rate_of_its_own() -> None:
    initial = {"embeddings": "x", "learning_rate_factor": 0.5}
    config = STAGE.load_config({"learning_rate": 0.2, "initial": initial})
    assert config.going_on().learning_rate == 0.1
