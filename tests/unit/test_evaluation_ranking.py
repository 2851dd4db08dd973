"""Full ranking and CSR against brute force."""

import pytest
import torch

from alignrec.data.csr import CSR
from alignrec.errors import UserError
from alignrec.evaluation.ranking import rank_all, rank_blocks, rank_scores, stable_topk

NONE = torch.tensor([], dtype=torch.int64)


def random_csr(num_rows: int, num_cols: int, density: float, seed: int = 0) -> CSR:
    generator = torch.Generator().manual_seed(seed)
    dense = torch.rand(num_rows, num_cols, generator=generator) < density
    rows, cols = dense.nonzero(as_tuple=True)
    return CSR.from_pairs(rows, cols, num_rows, num_cols)


def brute_force(scores: torch.Tensor, seen: set[int], k: int) -> list[int]:
    candidates = [(-float(s), i) for i, s in enumerate(scores) if i not in seen]
    best = [i for _, i in sorted(candidates)[:k]]
    return best + [-1] * (k - len(best))


def test_csr_rows_are_the_pairs_whatever_their_order_and_repetition() -> None:
    rows = torch.tensor([2, 0, 2, 0, 2])
    cols = torch.tensor([4, 1, 0, 3, 4])
    csr = CSR.from_pairs(rows, cols, 4, 5)
    assert [csr.row(r).tolist() for r in range(4)] == [[1, 3], [], [0, 4], []]
    assert csr.row_lengths.tolist() == [2, 0, 2, 0]
    assert csr.rows.tolist() == [0, 0, 2, 2]
    assert CSR.from_pairs(rows.numpy(), cols.numpy(), 4, 5).columns.tolist() == [1, 3, 0, 4]


def test_csr_contains_equals_set_membership() -> None:
    csr = random_csr(7, 11, 0.3)
    everything = torch.arange(-1, 11).expand(7, -1)
    expected = [[c in set(csr.row(r).tolist()) for c in range(-1, 11)] for r in range(7)]
    assert csr.contains(everything).tolist() == expected


def test_csr_column_minus_one_is_not_the_last_column_of_the_row_before() -> None:
    csr = CSR.from_pairs([0], [4], 2, 5)
    assert not csr.contains(torch.tensor([[-1], [-1]])).any()


def test_csr_select_takes_rows_in_order_and_more_than_once() -> None:
    csr = random_csr(6, 9, 0.4, seed=1)
    rows = torch.tensor([5, 0, 0, 3])
    chosen = csr.select(rows)
    assert [chosen.row(i).tolist() for i in range(4)] == [csr.row(int(r)).tolist() for r in rows]
    assert csr.select(torch.empty(0, dtype=torch.int64)).num_rows == 0


def test_csr_without_entries_contains_nothing() -> None:
    csr = CSR.from_pairs([], [], 3, 4)
    assert not csr.contains(torch.zeros(3, 2, dtype=torch.int64)).any()


@pytest.mark.parametrize(("row", "col"), [(3, 0), (0, 4), (-1, 0), (0, -1)])
def test_csr_refuses_numbers_of_another_dataset(row: int, col: int) -> None:
    with pytest.raises(ValueError, match="another dataset"):
        CSR.from_pairs([row], [col], 3, 4)


@pytest.mark.parametrize("block_users", [1, 3, 100])
def test_rank_all_equals_brute_force_without_seen_items(block_users: int) -> None:
    generator = torch.Generator().manual_seed(3)
    users = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    items = torch.randn(17, 4, generator=generator, dtype=torch.float64)
    seen = random_csr(10, 17, 0.4, seed=2)
    topk = rank_all(users, items, seen=seen, removed=NONE, k=6, block_users=block_users)
    for user in range(10):
        expected = brute_force(users[user] @ items.T, set(seen.row(user).tolist()), 6)
        assert topk[user].tolist() == expected


@pytest.mark.parametrize("k", [6, 17])
def test_removed_items_are_as_if_everybody_had_seen_them(k: int) -> None:
    generator = torch.Generator().manual_seed(4)
    users = torch.randn(10, 4, generator=generator)
    items = torch.randn(17, 4, generator=generator)
    removed = torch.tensor([0, 7, 16])
    items[removed] *= 100  # they would be first of everybody's list, or last
    seen = random_csr(10, 17, 0.4, seed=2)
    topk = rank_all(users, items, seen=seen, removed=removed, k=k, block_users=3)
    for user in range(10):
        left_out = {*seen.row(user).tolist(), *removed.tolist()}
        assert topk[user].tolist() == brute_force(users[user] @ items.T, left_out, k)


def test_rank_all_of_chosen_users_is_the_same_as_their_rows() -> None:
    users, items = torch.randn(8, 4), torch.randn(20, 4)
    seen = random_csr(8, 20, 0.2)
    every = rank_all(users, items, seen=seen, removed=NONE, k=5)
    chosen = torch.tensor([6, 1, 4])
    assert torch.equal(
        rank_all(users, items, users=chosen, seen=seen, removed=NONE, k=5), every[chosen]
    )


@pytest.mark.parametrize("k", [1, 4, 9, 30, 40])
def test_equal_scores_come_in_ascending_item_index(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    coarse = torch.randint(0, 3, (12, 30), generator=generator).float()
    seen = random_csr(12, 30, 0.3, seed=k)
    topk = rank_scores(
        lambda block: coarse[block],
        users=torch.arange(12),
        seen=seen,
        removed=NONE,
        k=k,
        block_users=5,
    )
    for user in range(12):
        assert topk[user].tolist() == brute_force(coarse[user], set(seen.row(user).tolist()), k)


def test_stable_topk_returns_the_values_of_its_columns() -> None:
    scores = torch.randint(0, 4, (6, 25)).float()
    columns, values = stable_topk(scores, 7)
    assert torch.equal(scores.gather(1, columns), values)
    assert (values.diff(dim=1) <= 0).all()


def test_users_who_have_seen_everything_get_no_item() -> None:
    seen = CSR.from_pairs([0, 0, 0], [0, 1, 2], 2, 3)
    topk = rank_all(torch.ones(2, 1), torch.ones(3, 1), seen=seen, removed=NONE, k=2)
    assert topk.tolist() == [[-1, -1], [0, 1]]


def test_rank_blocks_yields_scores_beside_items() -> None:
    users, items = torch.randn(5, 3), torch.randn(9, 3)
    seen = CSR.from_pairs([], [], 5, 9)
    blocks = list(
        rank_blocks(
            lambda b: users[b] @ items.T,
            users=torch.arange(5),
            seen=seen,
            removed=NONE,
            k=4,
            block_users=2,
        )
    )
    assert [b.tolist() for b, _, _ in blocks] == [[0, 1], [2, 3], [4]]
    for block, topk, values in blocks:
        torch.testing.assert_close(values, (users[block] @ items.T).gather(1, topk))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused(bad: float) -> None:
    items = torch.ones(4, 2)
    items[2, 1] = bad
    with pytest.raises(UserError, match="1 of 4 item embeddings are not finite"):
        rank_all(torch.ones(3, 2), items, seen=CSR.from_pairs([], [], 3, 4), removed=NONE, k=2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused_with_the_user(bad: float) -> None:
    scores = torch.zeros(3, 9)
    scores[1, 8] = bad
    with pytest.raises(UserError, match="user_index 1"):
        rank_scores(
            lambda block: scores[block],
            users=torch.arange(3),
            seen=CSR.from_pairs([], [], 3, 9),
            removed=NONE,
            k=2,
        )
