"""Full ranking in blocks of users: embeddings or any scores in, the k best items of each user out.

No score of a user who is not in the current block is in memory, so memory is
``block_users * num_items`` scores whatever the number of users.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.errors import UserError

# user_index of a block -> a score for every item; the ranking overwrites it.
ScoreFunction = Callable[[Int64[Tensor, " block"]], Float[Tensor, "block num_items"]]
Block = tuple[Int64[Tensor, " block"], Int64[Tensor, "block k"], Float[Tensor, "block k"]]

NO_ITEM = -1


def rank_all(
    user_embedding: Float[Tensor, "all_users d"],
    item_embedding: Float[Tensor, "num_items d"],
    *,
    users: Int64[Tensor, " num_users"] | None = None,
    seen: CSR,
    removed: Int64[Tensor, " num_removed"],
    k: int,
    block_users: int = 1024,
) -> Int64[Tensor, "num_users k"]:
    """Return the k items of the highest inner product for each user, best first.

    Args:
        user_embedding: one row for each user_index.
        item_embedding: one row for each item_index.
        users: user_index to rank for; all when None.
        seen: row u lists the items that user u must not be recommended (training positives).
        removed: items that nobody must be recommended; every other is a candidate, cold ones too.
        k: list length.
        block_users: users scored at a time.

    Returns:
        item_index; equal scores in ascending item_index; -1 where a user has no candidate left.

    Raises:
        UserError: an embedding or a score is NaN or infinite.
    """
    scores = inner_product(user_embedding, item_embedding)
    chosen = torch.arange(user_embedding.shape[0]) if users is None else users
    return rank_scores(
        scores, users=chosen, seen=seen, removed=removed, k=k, block_users=block_users
    )


def rank_scores(
    scores: ScoreFunction,
    *,
    users: Int64[Tensor, " num_users"],
    seen: CSR,
    removed: Int64[Tensor, " num_removed"],
    k: int,
    block_users: int = 1024,
) -> Int64[Tensor, "num_users k"]:
    """Return what ``rank_all`` does, for any score function."""
    topk = torch.full((users.numel(), k), NO_ITEM)
    done = 0
    for block, items, _ in rank_blocks(
        scores, users=users, seen=seen, removed=removed, k=k, block_users=block_users
    ):
        topk[done : done + block.numel()] = items.cpu()
        done += block.numel()
    return topk


def rank_blocks(
    scores: ScoreFunction,
    *,
    users: Int64[Tensor, " num_users"],
    seen: CSR,
    removed: Int64[Tensor, " num_removed"],
    k: int,
    block_users: int = 1024,
) -> Iterator[Block]:
    """Yield (user_index, item_index of the k best, their scores) for one block after another.

    For outputs that are streamed; see ``rank_all`` for the order and for -1.
    """
    for start in range(0, users.numel(), block_users):
        block = users[start : start + block_users]
        matrix = scores(block)  # (block, num_items)
        mask = seen.select(block)
        matrix[mask.rows.to(matrix.device), mask.columns.to(matrix.device)] = -torch.inf
        matrix[:, removed.to(matrix.device)] = -torch.inf
        items, values = stable_topk(matrix, k)
        _refuse_non_finite(values, block)
        items[values == -torch.inf] = NO_ITEM
        yield block, items, values


def inner_product(
    user_embedding: Float[Tensor, "all_users d"], item_embedding: Float[Tensor, "num_items d"]
) -> ScoreFunction:
    """Return the score function of trained embeddings.

    Raises:
        UserError: an embedding is NaN or infinite.
    """
    for name, table in (("user", user_embedding), ("item", item_embedding)):
        bad = int((~torch.isfinite(table).all(dim=1)).sum())
        if bad:
            raise UserError(
                f"{bad} of {table.shape[0]} {name} embeddings are not finite, so no ranking of "
                f"theirs has a meaning: the training diverged. Train again with a lower "
                f"align.learning_rate."
            )
    transposed = item_embedding.T

    def scores(block: Int64[Tensor, " block"]) -> Float[Tensor, "block num_items"]:
        return user_embedding[block.to(user_embedding.device)] @ transposed

    return scores


def stable_topk(
    scores: Float[Tensor, "rows n"], k: int
) -> tuple[Int64[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Return (columns, values) of the k largest of each row; equal values in ascending column.

    ``torch.topk`` leaves the order of equal values open, which makes popularity and other coarse
    scores differ between runs and machines. Rows shorter than k end with column -1, value -inf.
    """
    n = scores.shape[1]
    if k > n:
        columns, values = stable_topk(scores, n)
        columns = torch.nn.functional.pad(columns, (0, k - n), value=NO_ITEM)
        return columns, torch.nn.functional.pad(values, (0, k - n), value=-torch.inf)
    values, columns = scores.topk(min(k + 1, n), dim=1)
    if n > k:
        tied = (values[:, k - 1] == values[:, k]).nonzero().squeeze(1)
        values, columns = values[:, :k].clone(), columns[:, :k].clone()
        if tied.numel():
            chosen = _first_of_the_tied(scores[tied], values[tied, -1:], k)
            columns[tied] = chosen
            values[tied] = scores[tied].gather(1, chosen)
    columns, by_column = columns.sort(dim=1)
    values, by_value = values.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return columns.gather(1, by_value), values


def _first_of_the_tied(
    scores: Float[Tensor, "rows n"], threshold: Float[Tensor, "rows 1"], k: int
) -> Int64[Tensor, "rows k"]:
    """Return the columns above the k-th value, filled up to k with the first that equal it."""
    row, column = (~(scores < threshold)).nonzero(as_tuple=True)  # NaN stays, for the caller to see
    equal = scores[row, column] == threshold[row, 0]
    num_above = torch.bincount(row[~equal], minlength=scores.shape[0])
    of_row = row[equal]
    lengths = torch.bincount(of_row, minlength=scores.shape[0])
    before = (lengths.cumsum(0) - lengths)[of_row]  # equal values in earlier rows
    place = torch.arange(of_row.numel(), device=row.device) - before
    chosen = ~equal
    chosen[equal] = place < (k - num_above)[of_row]  # exactly k in each row
    return column[chosen].view(-1, k)


def _refuse_non_finite(values: Float[Tensor, "block k"], block: Int64[Tensor, " block"]) -> None:
    # NaN sorts above every number, so a NaN among the candidates is among the k best.
    bad = (values.isnan() | (values == torch.inf)).any(dim=1)
    if bad.any():
        user = int(block[bad.cpu().nonzero()[0, 0]])
        raise UserError(
            f"scores of user_index {user} (and {int(bad.sum()) - 1} more users of its block) are "
            f"not finite, so their ranking has no meaning. Look for NaN or huge values in the "
            f"features or embeddings and write them again."
        )
