"""Products with the graph's matrices against dense float64 matrices, in value and gradient."""

import torch

from alignrec.align.propagation import SparseMatrix, normalized_rates, propagate
from alignrec.data.csr import CSR
from alignrec.graph.hashing import salt

USERS, ITEMS, D = 5, 4, 3


def interactions() -> CSR:
    # User 4 and item 3 have no interactions.
    pairs = [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1), (2, 2), (3, 2)]
    users, items = zip(*pairs, strict=True)
    return CSR.from_pairs(users, items, USERS, ITEMS)


def dense_adjacency() -> torch.Tensor:
    """Return D^-1/2 A D^-1/2 over users and then items, float64."""
    train = interactions()
    a = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    a[train.rows, USERS + train.columns] = 1
    a = a + a.T
    scale = a.sum(1).clamp(min=1).rsqrt()
    return scale[:, None] * a * scale


def table(rows: int, seed: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, D, dtype=torch.float64, generator=g, requires_grad=True)


def test_a_product_and_its_gradient_equal_the_dense_ones() -> None:
    g = torch.Generator().manual_seed(0)
    dense = torch.rand(4, 6, dtype=torch.float64, generator=g)
    dense[dense < 0.5] = 0
    dense[2] = 0
    rows, columns = dense.nonzero(as_tuple=True)
    order = torch.randperm(len(rows), generator=g)
    matrix = SparseMatrix.from_entries(
        rows[order], columns[order], dense[rows, columns][order], (4, 6)
    )
    x = table(6, 1)
    weight = torch.rand(4, D, dtype=torch.float64, generator=g)
    torch.testing.assert_close(matrix.multiply(x), dense @ x)
    found = torch.autograd.grad((matrix.multiply(x) * weight).sum(), x)[0]
    torch.testing.assert_close(found, dense.T @ weight)
    torch.testing.assert_close(matrix.transpose.multiply(weight), dense.T @ weight)


def test_an_empty_matrix_gives_zeros() -> None:
    none = torch.empty(0, dtype=torch.int64)
    matrix = SparseMatrix.from_entries(none, none, torch.empty(0), (2, 3))
    assert torch.equal(matrix.multiply(torch.ones(3, 4)), torch.zeros(2, 4))


def test_propagation_is_the_mean_of_powers_of_the_adjacency() -> None:
    rates = normalized_rates(interactions())
    adjacency = dense_adjacency()
    for layers in (1, 2, 3):
        user, item = table(USERS, 2), table(ITEMS, 3)
        literal = torch.stack(
            [
                torch.linalg.matrix_power(adjacency, power) @ torch.cat([user, item])
                for power in range(layers + 1)
            ]
        ).mean(0)
        mine = torch.cat(propagate(rates, user, item, layers=layers))
        torch.testing.assert_close(mine, literal, rtol=1e-6, atol=1e-6)  # weights are float32
        g = torch.Generator().manual_seed(4)
        weight = torch.randn(literal.shape, dtype=torch.float64, generator=g)
        found = torch.autograd.grad((mine * weight).sum(), (user, item))
        wanted = torch.autograd.grad((literal * weight).sum(), (user, item))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_nodes_without_interactions_keep_their_own_embedding() -> None:
    user, item = table(USERS, 2), table(ITEMS, 3)
    h_user, h_item = propagate(normalized_rates(interactions()), user, item, layers=2)
    torch.testing.assert_close(h_user[4], user[4] / 3)
    torch.testing.assert_close(h_item[3], item[3] / 3)


def random_matrix() -> tuple[SparseMatrix, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    dense = torch.rand(60, 40, generator=g) * (torch.rand(60, 40, generator=g) < 0.3)
    rows, columns = dense.nonzero(as_tuple=True)
    return SparseMatrix.from_entries(rows, columns, dense[rows, columns], (60, 40)), dense


def test_a_thinned_matrix_lacks_a_share_and_has_its_own_transpose() -> None:
    matrix, dense = random_matrix()
    for share in (0.1, 0.6, 0.9):
        thinned = matrix.thinned(share, salt(1, 2))
        found = thinned.multiply(torch.eye(40))
        torch.testing.assert_close(thinned.transpose.multiply(torch.eye(60)), found.T)
        kept = int((found != 0).sum())
        assert abs(kept / int((dense != 0).sum()) - (1 - share)) < 0.06
        assert len(thinned.by_rows.columns) == kept  # the others cost nothing
    assert torch.equal(found, matrix.thinned(0.9, salt(1, 2)).multiply(torch.eye(40)))
    assert not torch.equal(found, matrix.thinned(0.9, salt(1, 3)).multiply(torch.eye(40)))
    assert matrix.thinned(0.0, salt(0)) is matrix


def test_thinned_matrices_are_the_matrix_on_average() -> None:
    matrix, dense = random_matrix()
    drawn = torch.stack(
        [matrix.thinned(0.4, salt(key)).multiply(torch.eye(40)) for key in range(400)]
    )
    there = dense != 0
    values, found = dense[there], drawn[:, there]
    torch.testing.assert_close(found[found > 0], (values.expand(400, -1) / 0.6)[found > 0])
    # entries are kept apart from each other: their errors are those of 400 coins
    deviation = (found.mean(0) - values) / (values * (0.4 / 0.6 / 400) ** 0.5)
    assert 0.8 < float(deviation.square().mean()) < 1.25
    none = torch.empty(0, dtype=torch.int64)
    empty = SparseMatrix.from_entries(none, none, torch.empty(0), (2, 3)).thinned(0.5, salt(0))
    assert torch.equal(empty.multiply(torch.ones(3, 4)), torch.zeros(2, 4))
