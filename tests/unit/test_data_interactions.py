"""A split that is read in parts is what it is as a whole."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from alignrec.data import interactions
from alignrec.data.csr import CSR
from alignrec.data.interactions import read_csr
from alignrec.data.schema import INTERACTIONS, interactions_path, read_interactions
from alignrec.errors import UserError
from alignrec.testing.datasets import write_dataset

USERS, ITEMS = 24, 48


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(interactions, "_BATCH_ROWS", 7)  # users lie in two parts
    return write_dataset(tmp_path / "dataset", num_items=ITEMS, num_users=USERS, idle_users=(0, 9))


def read(dataset: Path) -> CSR:
    return read_csr(dataset, "train", num_users=USERS, num_items=ITEMS)


def whole(dataset: Path) -> CSR:
    return CSR.from_pairs(*read_interactions(dataset, "train"), USERS, ITEMS)


def check_equal(found: CSR, expected: CSR) -> None:
    assert torch.equal(found.row_offsets, expected.row_offsets)
    assert torch.equal(found.columns.long(), expected.columns)
    users = torch.tensor([5, 0, 23])
    assert torch.equal(found.select(users).columns, expected.select(users).columns)
    assert torch.equal(found.row(5), expected.row(5))
    kept = torch.arange(ITEMS) % 2 == 0
    assert torch.equal(found.keep_columns(kept).columns, expected.keep_columns(kept).columns)


def test_parts_make_the_whole(dataset: Path) -> None:
    found = read(dataset)
    assert found.columns.dtype == torch.int32
    check_equal(found, whole(dataset))


def test_no_interactions(dataset: Path) -> None:
    pq.write_table(INTERACTIONS.empty_table(), interactions_path(dataset, "train"))
    check_equal(read(dataset), whole(dataset))


@pytest.mark.parametrize("order", ["reversed", "repeated"])
def test_a_table_in_another_order_counts_each_pair_once(dataset: Path, order: str) -> None:
    path = interactions_path(dataset, "train")
    table, expected = pq.read_table(path), whole(dataset)
    rows = np.arange(len(table))
    changed = rows[::-1] if order == "reversed" else np.repeat(rows, 2)
    pq.write_table(table.take(changed), path)
    check_equal(read(dataset), expected)


def test_an_id_of_another_dataset_is_named(dataset: Path) -> None:
    with pytest.raises(UserError, match=r"train\.parquet has item_index \d+, outside of 0\.\.9"):
        read_csr(dataset, "train", num_users=USERS, num_items=10)
