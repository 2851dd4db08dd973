"""Warm start and cold items: what rows start from, and whose catalogue they belong to."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec import artifacts
from alignrec.align import STAGE, catalogue
from alignrec.align.cold import fill_cold
from alignrec.align.initial import TRAINED, Earlier, content_source, leaks, take_over, trained_rows
from alignrec.errors import StageFailure, UserError
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType, NodeType

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
    masks = {f"{TRAINED}{n}": torch.ones(k, 1, dtype=torch.uint8) for n, k in KNOWN.items()}
    save_file(rows | masks, path)
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


def without_training(earlier: Earlier, table: NodeType, index: int) -> Earlier:
    """Return the same with a row that no training interaction had reached."""
    content = load_file(earlier.path)
    content[f"{TRAINED}{table}"][index] = 0
    save_file(content, earlier.path)
    return earlier


def test_who_had_no_training_interaction_yet_starts_like_a_new_one(earlier: Earlier) -> None:
    rows = load_file(earlier.path)
    without_training(without_training(earlier, ITEM, 2), USER, 0)
    tables = started(earlier, content=True)
    torch.testing.assert_close(tables[ITEM][2], rows[ITEM][3])  # its only similar item
    torch.testing.assert_close(tables[USER][0], (rows[ITEM][0] + rows[ITEM][1]) / 2)


def test_rows_without_training_are_in_no_mean(earlier: Earlier) -> None:
    rows = load_file(earlier.path)
    without_training(earlier, ITEM, 1)
    assert torch.equal(started(earlier, content=True)[ITEM][4], rows[ITEM][3])


def test_a_row_stays_trained_in_a_chain(earlier: Earlier) -> None:
    without_training(without_training(earlier, USER, 1), USER, 2)
    degree, ids = {USER: torch.tensor([0, 0, 4, 0, 2])}, {USER: torch.arange(5)}
    assert trained_rows(None, degree, ids)[USER].ravel().tolist() == [0, 0, 1, 0, 1]
    assert trained_rows(earlier, degree, ids)[USER].ravel().tolist() == [1, 0, 1, 0, 1]


def test_what_may_leak_is_told() -> None:
    first = {"split": {"strategy": "global_time", "held_out": 0.1}, "duplicates": "first"}
    assert leaks(first, first) == []
    last = {**first, "duplicates": "last"}
    at_random = {**first, "split": {"strategy": "user_random"}}
    other = {**first, "split": {"strategy": "global_time", "held_out": 0.2}}
    assert [len(leaks(*pair)) for pair in ((last, last), (first, last), (last, first))] == [1, 1, 1]
    assert "duplicates: first" in leaks(last, first)[0]
    assert "at random" in leaks(at_random, at_random)[0]
    assert len(leaks(at_random, first)) == 2
    assert "has changed" in leaks(other, first)[0]
    assert "has changed" in leaks(None, first)[0]


def test_imported_features_mean_the_same_only_where_they_are_the_same(tmp_path: Path) -> None:
    def source(name: str, rows: str, config: dict[str, object]) -> str:
        with artifacts.writing(
            tmp_path / name, kind="features", fingerprint="", config=config, inputs={}
        ) as draft:
            (draft.path / "features.npy").write_text(rows)
        return content_source(tmp_path / name)

    files = {"files": [{"path": "f.npy", "modality": "image"}]}
    assert source("a", "1", files) == source("b", "1", files)
    assert source("a", "1", files) != source("b", "2", files)
    extracted = {"files": [], "extraction": {"pooling": "cls"}}
    assert source("a", "1", extracted) == source("b", "2", extracted)


def test_embeddings_that_are_being_replaced_are_not_taken_for_absent(tmp_path: Path) -> None:
    folder = tmp_path / "align"
    config = STAGE.load_config({"initial": {"embeddings": str(folder), "optional": True}})
    assert config.earlier() is None
    for spare in ("align.old", "align.partial"):
        (tmp_path / spare).mkdir()
        assert config.earlier() is None
        (tmp_path / spare / artifacts.MANIFEST).write_text("{}")
        with pytest.raises(StageFailure, match="is being replaced"):
            config.earlier()
        shutil.rmtree(tmp_path / spare)


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


def test_keys_count_whatever_their_type_and_none_may_lack(tmp_path: Path) -> None:
    whole = write_keys(tmp_path / "whole", ["a", "b"], 2)
    large = pa.table({"item_key": pa.array(["a", "b"], pa.large_string())})
    pq.write_table(large, tmp_path / "items.parquet")
    digests = [catalogue.key_digest(folder, "item", num_rows=2) for folder in (whole, tmp_path)]
    assert digests[0] == digests[1]
    pq.write_table(pa.table({"item_key": ["a", None]}), tmp_path / "items.parquet")
    with pytest.raises(UserError, match="rows without item_key"):
        catalogue.key_digest(tmp_path, "item", num_rows=2)


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
