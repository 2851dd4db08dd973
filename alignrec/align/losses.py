"""The terms of stage 2's objective: rows of representations in, one number each out (PAPER.md).

A batch repeats users and items. Terms that compare all with all therefore read distinct rows with
the number of times each occurs (``count``): equal values, a fraction of the work. Terms that
average over triples divide by ``num_triples``, the triples of the whole step, so that ranks which
hold a share of the batch add up to the average.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional


def bpr_loss(
    positive_score: Float[Tensor, " b"], negative_score: Float[Tensor, " b"], *, num_triples: int
) -> Float[Tensor, ""]:
    """Return -sum log sigmoid(positive - negative) / num_triples (Rendle et al. 2009)."""
    return -functional.logsigmoid(positive_score - negative_score).sum() / num_triples


def info_nce_loss(
    anchor: Float[Tensor, "m d"],
    candidate: Float[Tensor, "n d"],
    *,
    positive: Int[Tensor, " m"],
    anchor_count: Float[Tensor, " m"],
    candidate_count: Float[Tensor, " n"],
    temperature: float,
    num_triples: int,
) -> Float[Tensor, ""]:
    """Return the contrastive loss by cosine over temperature, with in-batch negatives.

    Args:
        anchor: distinct rows to be explained.
        candidate: distinct rows of the other view, among them every anchor's positive, which is in
            the denominator too.
        positive: row of ``candidate`` that belongs to each anchor.
        anchor_count: times that each anchor occurs in the batch.
        candidate_count: times that each candidate occurs in the batch.
        temperature: at least ``config.MIN_TEMPERATURE``.
        num_triples: divisor.
    """
    terms: Tensor = _InfoNCETerms.apply(  # type: ignore[no-untyped-call]
        unit_rows(anchor), unit_rows(candidate), positive, candidate_count.to(anchor), temperature
    )
    return (terms * anchor_count).sum() / num_triples


def user_item_alignment_loss(
    user: Float[Tensor, "b d"], item: Float[Tensor, "b d"], *, num_triples: int
) -> Float[Tensor, ""]:
    """Return the sum of 1 - cos(user, item) over the triples / num_triples (UIA)."""
    return (1 - (unit_rows(user) * unit_rows(item)).sum(dim=1)).sum() / num_triples


def l2_loss(*rows: Float[Tensor, "b d"], num_triples: int) -> Float[Tensor, ""]:
    """Return half the sum of squared norms / num_triples."""
    return torch.stack([row.square().sum() for row in rows]).sum() / (2 * num_triples)


def similarity_moments(
    embedding: Float[Tensor, "n d"], target: Float[Tensor, "n f"], count: Float[Tensor, " n"]
) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d f"]]:
    """Return H^T H and H^T X over the batch, all that REG needs of it; ranks' shares add up."""
    weighted = (embedding * count.unsqueeze(1)).T  # (d, n)
    return weighted @ embedding, weighted @ target


def similarity_loss(
    moments: tuple[Float[Tensor, "d d"], Float[Tensor, "d f"]],
    target_square: Float[Tensor, ""],
    *,
    num_triples: int,
) -> Float[Tensor, ""]:
    """Return REG, ||H H^T - X X^T||_F / num_triples, without a batch x batch matrix.

    ||H H^T - X X^T||^2 = ||H^T H||^2 - 2 ||H^T X||^2 + ||X X^T||^2.

    Args:
        moments: of ``similarity_moments``.
        target_square: ||X X^T||_F^2 over the batch (``gram_square``).
        num_triples: divisor.
    """
    gram, cross = moments
    # float64: the three terms cancel to what is left of the difference.
    square = gram.double().square().sum() - 2 * cross.double().square().sum() + target_square
    return square.clamp(min=1e-12).sqrt().to(gram.dtype) / num_triples


def gram_square(target: Float[Tensor, "n f"], count: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Return ||X X^T||_F^2 of rows that occur ``count`` times, by the smaller of two products."""
    n, f = target.shape
    if n <= f:
        squares = (target @ target.T).square_().double()
        weights = count.double()
        return weights @ (squares @ weights)
    return ((target * count.unsqueeze(1)).T @ target).double().square().sum()


def unit_rows(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Divide each row by its norm; a zero row stays zero, with a finite gradient."""
    norm = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / torch.where(norm > 0, norm, 1.0)


class _InfoNCETerms(torch.autograd.Function):
    """-log softmax at the positive, for unit rows; keeps one matrix and reuses it backward.

    No row maximum is taken off: cosines are bounded, and the bound is taken off instead.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        anchor: Tensor,
        candidate: Tensor,
        positive: Tensor,
        candidate_count: Tensor,
        temperature: float,
    ) -> Tensor:
        bound = 1 / temperature
        similarity = (anchor * bound) @ candidate.T  # (m, n)
        at_positive = similarity.gather(1, positive.long().unsqueeze(1)).squeeze(1)
        weight = similarity.sub_(bound).exp_()
        total = weight @ candidate_count  # (m,)
        ctx.save_for_backward(anchor, candidate, positive, candidate_count, weight, total)
        ctx.temperature = temperature  # type: ignore[attr-defined]
        return total.log() + bound - at_positive

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, gradient: Tensor
    ) -> tuple[Tensor, Tensor, None, None, None]:
        anchor, candidate, positive, count, weight, total = ctx.saved_tensors  # type: ignore[attr-defined]
        gradient = (gradient / ctx.temperature).unsqueeze(1)  # type: ignore[attr-defined]
        scale = gradient / total.unsqueeze(1)
        counted = candidate * count.unsqueeze(1)
        for_anchor = (weight @ counted) * scale - gradient * candidate[positive.long()]
        for_candidate = (weight.T @ (anchor * scale)) * count.unsqueeze(1)
        for_candidate.index_add_(0, positive.long(), gradient * anchor, alpha=-1)
        return for_anchor, for_candidate, None, None, None
