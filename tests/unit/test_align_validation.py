"""Which users are judged while training, and how the held-out items of a rank's users are read."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from alignrec.align import inputs as inputs_module
from alignrec.align.inputs import Inputs
from alignrec.align.validation import Choice, Validation
from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.errors import UserError
from alignrec.testing.datasets import write_dataset

NUM_USERS, NUM_ITEMS = 50, 20


def make_inputs(dataset: Path) -> Inputs:
    return Inputs(
        dataset=dataset,
        features=dataset,
        graph=dataset,
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
    )


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validation") / "dataset"
    return write_dataset(folder, num_users=NUM_USERS, num_items=NUM_ITEMS)


@pytest.mark.parametrize("limit", [1, 7, 99, 100])
def test_as_many_users_are_judged_as_asked_for_and_others_with_another_seed(limit: int) -> None:
    users = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200]
    rows = torch.arange(0, 200, 2)  # every other row is a user of the validation
    chosen = Choice(users, limit, seed=3).among(rows)
    assert len(chosen) == limit
    assert set(chosen.tolist()) <= set(rows.tolist())
    assert torch.equal(Choice(users, limit, seed=3).among(rows), chosen)
    if limit < 100:
        assert set(Choice(users, limit, seed=4).among(rows).tolist()) != set(chosen.tolist())


def test_users_are_chosen_by_their_number_whatever_row_they_have() -> None:
    users = torch.arange(60)
    chosen = set(Choice(users, 9, seed=1).among(users).tolist())
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    found = Choice(users[order], 9, seed=1).among(torch.arange(60))
    assert set(users[order][found].tolist()) == chosen


def test_all_are_judged_without_a_limit_or_below_it() -> None:
    rows = torch.tensor([1, 4])
    for limit in (None, 2, 50):
        assert torch.equal(Choice(torch.arange(9), limit).among(rows), rows)


def test_the_metrics_are_those_of_the_users_that_are_judged() -> None:
    pairs = torch.arange(30), torch.arange(30) % 10
    train = CSR.from_pairs(*pairs, 30, 10)
    valid = CSR.from_pairs(pairs[0], (pairs[1] + 1) % 10, 30, 10)
    choice = Choice(torch.arange(30), 8, seed=2)
    removed = torch.empty(0, dtype=torch.int64)
    some = Validation(train, valid, choice=choice, removed=removed, block_users=4)
    assert some.num_users == 8
    user = torch.zeros(30, 1)
    user[choice.among(torch.arange(30))] = 1  # nobody else's embedding is read
    user[user == 0] = 1e9
    totals = some.totals(user, torch.ones(10, 1))
    assert totals[0] == 8
    assert totals[1] == 8  # the list holds every item


def test_a_split_is_read_in_parts(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs_module, "_BATCH_ROWS", 7)
    parts = list(make_inputs(dataset).interaction_batches("valid"))
    assert len(parts) > 2
    assert max(len(users) for users, _ in parts) <= 7
    for found, wanted in zip(
        map(torch.cat, zip(*parts, strict=True)),
        schema.read_interactions(dataset, "valid"),
        strict=True,
    ):
        assert np.array_equal(found.numpy(), wanted)


@pytest.mark.parametrize(("user", "item"), [(NUM_USERS, 0), (0, NUM_ITEMS), (-1, 0)])
def test_a_split_of_another_dataset_is_refused(tmp_path: Path, user: int, item: int) -> None:
    path = schema.interactions_path(tmp_path, "valid")
    path.parent.mkdir()
    pq.write_table(pa.table({"user_index": [0, user], "item_index": [0, item]}), path)
    with pytest.raises(UserError, match=f"user_index {user} and item_index {item} are not within"):
        list(make_inputs(tmp_path).interaction_batches("valid"))
