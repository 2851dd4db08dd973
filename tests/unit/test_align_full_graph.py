"""The full-graph objective against PAPER's formulas on dense float64 matrices."""

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from alignrec.align.batches import Triples
from alignrec.align.config import AlignConfig
from alignrec.align.full_graph import FullGraphModel
from alignrec.align.objective import objective, weigh
from alignrec.align.peers import Alone
from alignrec.align.propagation import SparseMatrix, normalized_rates
from alignrec.data.csr import CSR

USERS, ITEMS, F = 6, 5, 7
CONFIG = AlignConfig(embedding_dim=4, cca_weight=0.3, reg_weight=0.4, l2_weight=0.05)
# User 5 and item 4 have no interactions; item 3 has no content and no similar item.
TRAIN = CSR.from_pairs(
    [0, 0, 1, 1, 2, 3, 3, 4], [0, 1, 1, 2, 3, 0, 2, 1], num_rows=USERS, num_cols=ITEMS
)
TRIPLES = Triples(
    torch.tensor([0, 0, 1, 2, 4, 0]),
    torch.tensor([0, 1, 2, 3, 1, 0]),
    torch.tensor([2, 3, 0, 1, 0, 3]),
)


def make_model(config: AlignConfig) -> tuple[FullGraphModel, Tensor, Tensor]:
    """Return the model in float64 with dense S and the features."""
    g = torch.Generator().manual_seed(0)
    features = torch.randn(ITEMS, F, dtype=torch.float64, generator=g)
    features[3] = 0
    similar = torch.rand(ITEMS, ITEMS, dtype=torch.float64, generator=g)
    similar = (similar + similar.T).fill_diagonal_(0)
    similar[3], similar[:, 3] = 0, 0
    rows, columns = similar.nonzero(as_tuple=True)
    matrix = SparseMatrix.from_entries(rows, columns, similar[rows, columns], (ITEMS, ITEMS))
    model = FullGraphModel(
        config,
        normalized_rates(TRAIN),
        (USERS, ITEMS),
        matrix if config.content else None,
        features if config.content else None,
    )
    return model.double(), similar, features


def evaluate(config: AlignConfig, model: FullGraphModel) -> tuple[Tensor, dict[str, Tensor]]:
    nodes = model.represent()
    return objective(
        config, nodes, TRIPLES, model.content, peers=Alone(), num_triples=len(TRIPLES.user)
    )


def literal_objective(
    config: AlignConfig, model: FullGraphModel, similar: Tensor, features: Tensor
) -> Tensor:
    """Return L of PAPER.md, term by term, with dense matrices and the whole batch."""
    r = torch.zeros(USERS, ITEMS, dtype=torch.float64)
    r[TRAIN.rows, TRAIN.columns] = 1
    r = r / (r.sum(1, keepdim=True).clamp(min=1) * r.sum(0).clamp(min=1)).sqrt()
    a = torch.zeros(USERS + ITEMS, USERS + ITEMS, dtype=torch.float64)
    a[:USERS, USERS:], a[USERS:, :USERS] = r, r.T
    e = torch.cat([model.user, model.item])
    h_id = (e + a @ e + a @ a @ e) / 3
    u, p, n = TRIPLES.user, TRIPLES.positive, TRIPLES.negative
    users, items = h_id[:USERS], h_id[USERS:]
    total = torch.zeros((), dtype=torch.float64)
    if config.content:
        hidden = features @ model.gate.project.weight.T + model.gate.project.bias
        gate = torch.sigmoid(hidden @ model.gate.gate.weight.T + model.gate.gate.bias)
        mm_item = similar.matrix_power(config.content_layers) @ (model.item * gate)
        mm_user = r @ mm_item
        for view, other in ((mm_item[p], items[p]), (mm_user[u], users[u])):
            logits = cosine_similarity(view[:, None], other[None], dim=2) / config.temperature
            cca = -logits.log_softmax(dim=1).diagonal().mean()
            total = total + config.cca_weight * cca
        content = cosine_similarity(features[p][:, None], features[p][None], dim=2).detach()
        difference = mm_item[p] @ mm_item[p].T - content
        total = total + config.reg_weight * difference.square().sum().sqrt() / len(u)
        users, items = users + mm_user, items + mm_item
    hu, hp, hn = users[u], items[p], items[n]
    total = total - ((hu * hp).sum(1) - (hu * hn).sum(1)).sigmoid().log().mean()
    total = total + config.uia_weight * (1 - cosine_similarity(hu, hp)).mean()
    norms = hu.square().sum() + hp.square().sum() + hn.square().sum()
    return total + config.l2_weight * norms / 2 / len(u)


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, content=False),
        dataclasses.replace(CONFIG, paper_compatible=True),
        dataclasses.replace(CONFIG, content_layers=2),
    ],
    ids=["content", "id only", "paper_compatible", "two content layers"],
)
def test_the_objective_and_its_gradients_equal_the_literal_formulas(config: AlignConfig) -> None:
    model, similar, features = make_model(config)
    loss, terms = evaluate(config, model)
    assert set(terms) == {"bpr", "uia", "l2"} | ({"cca", "reg"} if config.content else set())
    table = dict(model.named_parameters()).get("content.features", features)
    literal = literal_objective(config, model, similar, table)
    # The weights of the user-item graph are float32.
    torch.testing.assert_close(loss, literal, rtol=1e-6, atol=1e-7)
    parameters = list(model.parameters())
    found = torch.autograd.grad(loss, parameters)
    wanted = torch.autograd.grad(literal, parameters)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-7)


def test_the_feature_table_is_trained_only_where_the_paper_is_followed() -> None:
    fixed, _, _ = make_model(CONFIG)
    drifting, _, _ = make_model(dataclasses.replace(CONFIG, paper_compatible=True))
    extra = {n for n, _ in drifting.named_parameters()} - {n for n, _ in fixed.named_parameters()}
    assert extra == {"content.features"}
    assert drifting.content is not None
    before = drifting.content.target(torch.arange(2))
    with torch.no_grad():
        dict(drifting.named_parameters())["content.features"].mul_(-1).add_(1)
    assert not torch.allclose(drifting.content.target(torch.arange(2)), before)


def test_nodes_without_interactions_or_content_are_finite() -> None:
    model, _, _ = make_model(CONFIG)
    user, item = model.represent().fused()
    assert user.isfinite().all()
    assert item.isfinite().all()
    # The cold item 4 has content, so its similar items speak for it.
    assert not torch.allclose(item[4], model.item[4] / 3)
    loss, _ = evaluate(CONFIG, model)
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_every_weight_has_an_effect() -> None:
    terms = {name: torch.tensor(1.0) for name in ("bpr", "uia", "cca", "reg", "l2")}
    total = weigh(CONFIG, terms).item()
    for name in ("uia_weight", "cca_weight", "reg_weight", "l2_weight"):
        changed = dataclasses.replace(CONFIG, **{name: getattr(CONFIG, name) + 1})
        assert weigh(changed, terms).item() == pytest.approx(total + 1)
