"""Ranking metrics: top-k lists and held-out items in, a number a metric out (ranking -> report).

Every metric is the mean over users of a number in 0..1, in float64; definitions as in MMRec's and
RecBole's full ranking. ``NO_ITEM`` (-1) in a list is a miss.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from alignrec.data.csr import CSR

KS = (5, 10, 20, 50)


def evaluation_users(train: CSR, held_out: CSR) -> Int64[Tensor, " num_users"]:
    """Return the user_index of those with held-out items and training items, ascending.

    Users without training items are dropped, as this family's protocol does: no model that is
    compared here knows anything of them.
    """
    return ((train.row_lengths > 0) & (held_out.row_lengths > 0)).nonzero().squeeze(1)


def recall_at_k(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, *, k: int
) -> Float64[Tensor, ""]:
    """Average over users of |top-k and held-out| / |held-out|.

    Args:
        topk: item_index of the best items of each user, best first.
        held_out: row u lists the held-out items of the user of row u of ``topk``; none is empty.
        k: list length in items, at most ``topk.shape[1]``.

    Raises:
        ValueError: the lists are shorter than k, or do not belong to the rows of ``held_out``.
    """
    return recall_of_users(_hits(topk, held_out, k), held_out.row_lengths, k).mean()


def precision_at_k(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, *, k: int
) -> Float64[Tensor, ""]:
    """Average over users of |top-k and held-out| / k; arguments as for ``recall_at_k``."""
    return _hits(topk, held_out, k).sum(dim=1).double().div(k).mean()


def ndcg_at_k(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, *, k: int
) -> Float64[Tensor, ""]:
    """Average over users of DCG / ideal DCG with binary relevance; arguments as above.

    The ideal list holds min(|held-out|, k) hits first.
    """
    return ndcg_of_users(_hits(topk, held_out, k), held_out.row_lengths, k).mean()


def map_at_k(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, *, k: int
) -> Float64[Tensor, ""]:
    """Average over users of average precision over min(|held-out|, k); arguments as above."""
    hits = _hits(topk, held_out, k)
    return map_of_users(hits, held_out.row_lengths, k).mean()


def evaluate(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, ks: Sequence[int] = KS
) -> dict[str, float]:
    """Return {"recall@5": ..., "ndcg@5": ..., "precision@5": ..., "map@5": ..., ...}.

    Raises:
        ValueError: as ``recall_at_k``.
    """
    hits, lengths = _hits(topk, held_out, max(ks)), held_out.row_lengths
    result = {}
    for k in ks:
        result[f"recall@{k}"] = recall_of_users(hits, lengths, k).mean().item()
        result[f"ndcg@{k}"] = ndcg_of_users(hits, lengths, k).mean().item()
        result[f"precision@{k}"] = hits[:, :k].sum(dim=1).double().div(k).mean().item()
        result[f"map@{k}"] = map_of_users(hits, lengths, k).mean().item()
    return result


def recall_of_users(
    hits: Bool[Tensor, "num_users width"], lengths: Int64[Tensor, " num_users"], k: int
) -> Float64[Tensor, " num_users"]:
    """Return each user's recall@k; ``lengths`` are the numbers of held-out items."""
    return hits[:, :k].sum(dim=1).double() / lengths


def ndcg_of_users(
    hits: Bool[Tensor, "num_users width"], lengths: Int64[Tensor, " num_users"], k: int
) -> Float64[Tensor, " num_users"]:
    """Return each user's NDCG@k."""
    discount = torch.arange(2, k + 2, dtype=torch.float64, device=hits.device).log2().reciprocal()
    ideal = discount.cumsum(0)[lengths.clamp(max=k) - 1]
    return (hits[:, :k] * discount).sum(dim=1) / ideal


def map_of_users(
    hits: Bool[Tensor, "num_users width"], lengths: Int64[Tensor, " num_users"], k: int
) -> Float64[Tensor, " num_users"]:
    """Return each user's average precision@k."""
    rank = torch.arange(1, k + 1, dtype=torch.float64, device=hits.device)
    precision = hits[:, :k].cumsum(dim=1) / rank
    return (precision * hits[:, :k]).sum(dim=1) / lengths.clamp(max=k)


def _hits(
    topk: Int64[Tensor, "num_users width"], held_out: CSR, k: int
) -> Bool[Tensor, "num_users k"]:
    if not 1 <= k <= topk.shape[1]:
        raise ValueError(
            f"k={k} is not within the {topk.shape[1]} ranked items per user: the metric would be "
            f"understated. Rank at least {k} items."
        )
    if held_out.num_rows != topk.shape[0] or topk.shape[0] == 0:
        raise ValueError(
            f"{topk.shape[0]} lists for {held_out.num_rows} users: row u of both must be the same "
            f"user, and there must be one. Use held_out.select(users) of the users ranked."
        )
    if not bool((held_out.row_lengths > 0).all()):
        raise ValueError(
            "a user without held-out items has no recall (0/0). Rank evaluation_users(...) only."
        )
    return held_out.contains(topk[:, :k])
