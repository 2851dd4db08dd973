"""Order and negatives, initial rows, row-wise Adam, files that ranks fill together."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from alignrec.align import row_file
from alignrec.align.batches import Distinct, TripleSchedule
from alignrec.align.model import initial_rows
from alignrec.align.sharded_embedding import ShardedEmbedding
from alignrec.data.csr import CSR
from alignrec.distributed.exchange import Exchange
from alignrec.distributed.process_group import Rank

TRAIN = CSR.from_pairs([0, 0, 0, 1, 2, 2, 4, 4], [0, 1, 2, 3, 0, 3, 5, 1], num_rows=5, num_cols=7)


def test_every_interaction_comes_once_an_epoch_with_an_item_that_the_user_has_not() -> None:
    schedule = TripleSchedule(TRAIN, batch_size=3, seed=1)
    orders = []
    for epoch in range(20):
        steps = list(schedule.epoch(epoch))
        assert len(steps) == schedule.num_steps == 3
        user, positive, negative = (
            torch.cat([getattr(s, name) for s in steps])
            for name in ("user", "positive", "negative")
        )
        pairs = list(zip(user.tolist(), positive.tolist(), strict=True))
        assert sorted(pairs) == list(zip(TRAIN.rows.tolist(), TRAIN.columns.tolist(), strict=True))
        assert not TRAIN.contains_pairs(user, negative).any()
        assert set(negative.tolist()) <= set(TRAIN.columns.tolist())  # 4 and 6 never occur
        orders.append(pairs)
    assert orders[0] != orders[1]


def test_a_step_is_a_function_of_seed_epoch_and_step() -> None:
    whole = list(TripleSchedule(TRAIN, batch_size=3, seed=1).epoch(4))
    rest = list(TripleSchedule(TRAIN, batch_size=3, seed=1).epoch(4, first_step=2))
    assert [t.negative.tolist() for t in rest] == [t.negative.tolist() for t in whole[2:]]
    assert [t.user.tolist() for t in rest] == [t.user.tolist() for t in whole[2:]]
    other = list(TripleSchedule(TRAIN, batch_size=3, seed=2).epoch(4))
    assert [t.user.tolist() for t in other] != [t.user.tolist() for t in whole]


def test_distinct_values_rebuild_their_list() -> None:
    values = torch.tensor([5, 2, 5, 9])
    distinct = Distinct.of(values)
    assert torch.equal(distinct.ids[distinct.position], values)
    assert distinct.count.tolist() == [1, 2, 1]


def test_initial_rows_do_not_depend_on_who_asks() -> None:
    whole = initial_rows(torch.arange(9000), 4, num_rows=9000, table=0, seed=3)
    some = torch.tensor([8999, 0, 4095, 4096])
    assert torch.equal(initial_rows(some, 4, num_rows=9000, table=0, seed=3), whole[some])
    assert not torch.equal(initial_rows(some, 4, num_rows=9000, table=1, seed=3), whole[some])
    bound = (6 / 9004) ** 0.5
    assert bound * 0.99 < whole.abs().max() <= bound
    assert abs(whole.mean()) < bound / 50


def make_table(weight: torch.Tensor) -> ShardedEmbedding:
    return ShardedEmbedding(
        weight.clone(),
        owned=torch.arange(len(weight)),
        owner_of=torch.zeros_like,
        local_rows=lambda ids: ids,
        exchange=Exchange(Rank()),
    )


def test_updates_of_all_rows_are_adam() -> None:
    g = torch.Generator().manual_seed(0)
    table = make_table(torch.randn(4, 3, generator=g))
    dense = torch.nn.Parameter(table.weight.clone())
    adam = torch.optim.Adam([dense], lr=0.1)
    target = torch.randn(4, 3, generator=g)
    for _ in range(5):
        lookup = table.lookup(torch.tensor([2, 0, 3, 1]))
        (lookup.rows - target[[2, 0, 3, 1]]).square().sum().backward()
        table.update(lookup, learning_rate=0.1)
        adam.zero_grad()
        (dense - target).square().sum().backward()
        adam.step()
        torch.testing.assert_close(table.weight, dense.data)


def test_only_rows_that_were_asked_for_move_and_a_late_row_starts_like_an_early_one() -> None:
    table = make_table(torch.ones(3, 2))
    for ids in ([0], [0], [0, 2]):
        lookup = table.lookup(torch.tensor(ids))
        lookup.rows.sum().backward()
        table.update(lookup, learning_rate=0.1)
    assert torch.equal(table.weight[1], torch.ones(2))
    torch.testing.assert_close(table.weight[2], torch.full((2,), 0.9))
    torch.testing.assert_close(table.weight[0], torch.full((2,), 0.7))


def test_saved_rows_load_into_another_table() -> None:
    table = make_table(torch.randn(3, 2))
    lookup = table.lookup(torch.tensor([1]))
    lookup.rows.sum().backward()
    table.update(lookup, learning_rate=0.1)
    other = make_table(torch.zeros(3, 2))
    other.load(table.state())
    assert all(torch.equal(other.state()[n], v) for n, v in table.state().items())


def test_rows_in_any_order_make_one_safetensors_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tables.safetensors"
    monkeypatch.setattr(row_file, "_RANGE_BYTES", 16)  # two rows at once
    shapes = {"user": (5, 2), "bias": (2,), "one": (2, 2), "none": (0, 2), "mask": (5, 1)}
    row_file.create(path, shapes, masks=["mask"])
    index = torch.tensor([2, 0, 4, 3, 1])
    rows = torch.tensor([[5.0, 6], [1, 2], [9, 10], [7, 8], [3, 4]])
    row_file.write_rows(path, "user", index, rows, exchange=Exchange(Rank()))
    row_file.write_rows(path, "none", index[:0], rows[:0], exchange=Exchange(Rank()))
    mask = torch.tensor([[1], [0], [0], [1], [0]], dtype=torch.uint8)
    row_file.write_rows(path, "mask", index, mask, exchange=Exchange(Rank()))
    row_file.write_whole(path, "bias", torch.tensor([7.0, 8]))
    row_file.write_whole(path, "one", torch.tensor([[1.0, 2], [3, 4]]).T)
    found = load_file(path)
    assert found["user"].tolist() == [[1, 2], [3, 4], [5, 6], [7, 8], [9, 10]]
    assert found["bias"].tolist() == [7, 8]
    assert found["one"].tolist() == [[1, 3], [2, 4]]
    assert found["none"].shape == (0, 2)
    assert found["mask"].dtype == torch.uint8
    assert found["mask"].ravel().tolist() == [0, 0, 1, 1, 0]
    assert torch.equal(row_file.read(path, "mask"), found["mask"])
    assert row_file.read(path, "user").tolist() == found["user"].tolist()


def test_a_user_with_every_item_is_reported() -> None:
    everything = CSR.from_pairs([0, 0, 1], [0, 1, 0], num_rows=2, num_cols=2)
    with pytest.raises(ValueError, match="user_index 0 has interacted with all 2 items"):
        list(TripleSchedule(everything, batch_size=8, seed=0).epoch(0))
