"""Validation of embeddings while they are trained (embeddings -> early stop, model selection)."""

from jaxtyping import Float
from torch import Tensor

from alignrec.data.csr import CSR
from alignrec.errors import UserError
from alignrec.evaluation import metrics
from alignrec.evaluation.ranking import rank_all

SELECTION_K = 20
SELECTION_METRIC = f"recall@{SELECTION_K}"


class Validation:
    """Full ranking of every item for the users of the validation split.

    Raises:
        UserError: no user has interactions in both splits, so nothing could be selected.
    """

    def __init__(self, train: CSR, valid: CSR, *, block_users: int) -> None:
        self._users = metrics.evaluation_users(train, valid)
        if not len(self._users):
            raise UserError(
                "no user has interactions in both train and valid: without validation there is no "
                "best epoch. Prepare the dataset with a validation split."
            )
        self._seen = train
        self._held_out = valid.select(self._users)
        self._block_users = block_users

    def metrics(
        self, user: Float[Tensor, "num_users d"], item: Float[Tensor, "num_items d"]
    ) -> dict[str, float]:
        """Return recall@20 and ndcg@20; positives of training are no candidates.

        Raises:
            UserError: an embedding is not finite.
        """
        topk = rank_all(
            user,
            item,
            users=self._users,
            seen=self._seen,
            k=SELECTION_K,
            block_users=self._block_users,
        )
        return {
            SELECTION_METRIC: metrics.recall_at_k(topk, self._held_out, k=SELECTION_K).item(),
            f"ndcg@{SELECTION_K}": metrics.ndcg_at_k(topk, self._held_out, k=SELECTION_K).item(),
        }
