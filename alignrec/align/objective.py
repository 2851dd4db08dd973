"""The weighted sum of the losses of one step in full-graph mode (representations -> gradients)."""

import dataclasses

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from alignrec.align import losses
from alignrec.align.batches import Distinct, Triples
from alignrec.align.config import AlignConfig
from alignrec.align.content import Content


@dataclasses.dataclass(frozen=True)
class Representations:
    """Propagated representations of all nodes.

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


def objective(
    config: AlignConfig, nodes: Representations, triples: Triples, content: Content | None
) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
    """Return the loss to minimise, and its terms before weighting by name."""
    total = len(triples.user)
    user, item = Distinct.of(triples.user), Distinct.of(triples.positive)
    user_rows, item_rows = nodes.fused()
    h_user = rows(user_rows, triples.user)
    h_positive = rows(item_rows, triples.positive)
    h_negative = rows(item_rows, triples.negative)
    terms = {
        "bpr": losses.bpr_loss(
            (h_user * h_positive).sum(dim=1), (h_user * h_negative).sum(dim=1), num_triples=total
        ),
        "uia": losses.user_item_alignment_loss(h_user, h_positive, num_triples=total),
        "l2": losses.l2_loss(h_user, h_positive, h_negative, num_triples=total),
    }
    if content is not None:
        terms |= _content_terms(config, nodes, user, item, content, total)
    return weigh(config, terms), terms


def weigh(config: AlignConfig, terms: dict[str, Float[Tensor, ""]]) -> Float[Tensor, ""]:
    """Return the weighted sum of the terms: BPR + UIA + CCA + REG + L2."""
    weights = {
        "bpr": 1.0,
        "uia": config.uia_weight,
        "cca": config.cca_weight,
        "reg": config.reg_weight,
        "l2": config.l2_weight,
    }
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


def rows(table: Float[Tensor, "n d"], index: Tensor) -> Float[Tensor, "b d"]:
    """Gather rows; the gradient adds up equal rows in parallel and in a fixed order."""
    return functional.embedding(index, table)


def _content_terms(
    config: AlignConfig,
    nodes: Representations,
    user: Distinct,
    item: Distinct,
    content: Content,
    total: int,
) -> dict[str, Float[Tensor, ""]]:
    assert nodes.user_content is not None
    assert nodes.item_content is not None
    item_content = rows(nodes.item_content, item.ids)
    views = (
        (item_content, rows(nodes.item_id, item.ids), item),
        (rows(nodes.user_content, user.ids), rows(nodes.user_id, user.ids), user),
    )
    cca = [
        losses.info_nce_loss(
            anchor,
            candidate,
            positive=torch.arange(len(anchor), device=anchor.device),
            anchor_count=batch.count,
            candidate_count=batch.count,
            temperature=config.temperature,
            num_triples=total,
        )
        for anchor, candidate, batch in views
    ]
    target = content.target(item.ids)
    reg = losses.similarity_loss(
        losses.similarity_moments(item_content, target, item.count),
        content.target_square(item.ids, target, item.count),
        num_triples=total,
    )
    return {"cca": cca[0] + cca[1], "reg": reg}
