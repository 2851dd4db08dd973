"""The weighted sum of the losses of one step (representations and triples -> loss)."""

import dataclasses
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from alignrec.align import losses
from alignrec.align.batches import Distinct, Triples
from alignrec.align.config import AlignConfig
from alignrec.align.peers import Peers

Terms = dict[str, Float[Tensor, ""]]


@dataclasses.dataclass(frozen=True)
class Representations:
    """Propagated representations of nodes: of the whole graph, or of a batch.

    Attributes:
        user_id: H_id of users.
        item_id: H_id of items.
        user_content: H_mm of users, None without content.
        item_content: H_mm of items, None without content.
    """

    user_id: Float[Tensor, "num_users d"]
    item_id: Float[Tensor, "num_items d"]
    user_content: Float[Tensor, "num_users d"] | None = None
    item_content: Float[Tensor, "num_items d"] | None = None

    def fused(self) -> tuple[Float[Tensor, "num_users d"], Float[Tensor, "num_items d"]]:
        """Return (user, item) final representations: H_id + H_mm."""
        if self.user_content is None or self.item_content is None:
            return self.user_id, self.item_id
        return self.user_id + self.user_content, self.item_id + self.item_content


class Target(Protocol):
    """What REG compares H_mm with."""

    def target(self, items: Int64[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """Return unit rows of content features of distinct items, without gradient."""
        ...

    def target_square(
        self, items: Int64[Tensor, " n"], target: Float[Tensor, "n f"], count: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """Return ||X X^T||_F^2 of the whole batch; ``items`` are this rank's, with counts."""
        ...


def objective(
    config: AlignConfig,
    nodes: Representations,
    triples: Triples,
    target: Target | None,
    *,
    peers: Peers,
    num_triples: int,
) -> tuple[Float[Tensor, ""], Terms]:
    """Return the loss to minimise, and its terms before weighting by name.

    The gradients of all ranks add up to the gradient of the whole batch's loss; so do the terms,
    but for "reg", which every rank returns in full.

    Args:
        config: weights and temperature.
        nodes: representations that ``triples`` refer to.
        triples: this rank's share of the batch, as rows of ``nodes``.
        target: content features; None without content.
        peers: the ranks that share the batch.
        num_triples: triples of the whole batch.
    """
    user_rows, item_rows = nodes.fused()
    h_user = rows(user_rows, triples.user)
    h_positive = rows(item_rows, triples.positive)
    h_negative = rows(item_rows, triples.negative)
    positive_score = (h_user * h_positive).sum(dim=1)
    negative_score = (h_user * h_negative).sum(dim=1)
    terms = {
        "bpr": losses.bpr_loss(positive_score, negative_score, num_triples=num_triples),
        "uia": losses.user_item_alignment_loss(h_user, h_positive, num_triples=num_triples),
        "l2": losses.l2_loss(h_user, h_positive, h_negative, num_triples=num_triples),
    }
    if target is not None:
        user, item = Distinct.of(triples.user), Distinct.of(triples.positive)
        terms["cca"] = _content_category(config, nodes, user, item, peers, num_triples)
        terms["reg"] = _similarity(nodes, item, target, peers, num_triples)
    return weigh(config, terms), terms


def weigh(config: AlignConfig, terms: Terms) -> Float[Tensor, ""]:
    """Return the weighted sum of the terms: BPR + UIA + L2 + CCA + REG."""
    weights = {
        "bpr": 1.0,
        "uia": config.uia_weight,
        "l2": config.l2_weight,
        "cca": config.cca_weight,
        "reg": config.reg_weight,
    }
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def rows(table: Float[Tensor, "n d"], index: Int64[Tensor, " b"]) -> Float[Tensor, "b d"]:
    """Gather rows; the gradient adds up equal rows in parallel and in a fixed order."""
    return functional.embedding(index, table)


def _content_category(
    config: AlignConfig,
    nodes: Representations,
    user: Distinct,
    item: Distinct,
    peers: Peers,
    num_triples: int,
) -> Float[Tensor, ""]:
    """Return CCA: H_mm against H_id, among the batch's items and among its users."""
    assert nodes.user_content is not None
    assert nodes.item_content is not None
    views = ((nodes.item_content, nodes.item_id, item), (nodes.user_content, nodes.user_id, user))
    candidates = _candidates([(rows(table, d.ids), d.count) for _, table, d in views], peers)
    terms = [
        losses.info_nce_loss(
            rows(content, distinct.ids),
            candidate,
            positive=first + torch.arange(len(distinct.ids), device=candidate.device),
            anchor_count=distinct.count,
            candidate_count=count,
            temperature=config.temperature,
            num_triples=num_triples,
        )
        for (content, _, distinct), (candidate, count, first) in zip(views, candidates, strict=True)
    ]
    return terms[0] + terms[1]


def _candidates(
    views: list[tuple[Tensor, Tensor]], peers: Peers
) -> list[tuple[Tensor, Tensor, int]]:
    """Return for each view all ranks' (rows, counts) and where this rank's rows begin.

    All views travel at once: one collective in the backward pass, whose order cannot differ.
    """
    if peers.world_size == 1:
        return [(table, count, 0) for table, count in views]
    marked = [
        torch.cat([table, count.to(table)[:, None], torch.full_like(count, view)[:, None]], dim=1)
        for view, (table, count) in enumerate(views)
    ]
    everyone, first = peers.gather(torch.cat(marked))
    result = []
    for view in range(len(views)):
        inside = everyone[:, -1] == view
        chosen = everyone[inside]
        result.append((chosen[:, :-2], chosen[:, -2].detach(), int(inside[:first].sum())))
    return result


def _similarity(
    nodes: Representations, item: Distinct, target: Target, peers: Peers, num_triples: int
) -> Float[Tensor, ""]:
    """Return REG over the positive items of the whole batch."""
    assert nodes.item_content is not None
    content = target.target(item.ids)
    gram, cross = losses.similarity_moments(rows(nodes.item_content, item.ids), content, item.count)
    square = target.target_square(item.ids, content, item.count)
    return losses.similarity_loss(
        (peers.sum(gram), peers.sum(cross)), square, num_triples=num_triples
    )
