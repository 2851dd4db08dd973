"""Settings of the evaluation stage (section ``evaluation`` of a recipe)."""

import dataclasses

from alignrec.configuration import option
from alignrec.errors import UserError


@dataclasses.dataclass(frozen=True)
class ItemCFConfig:
    """Item-based collaborative filtering on content similarity, an intermediate evaluation."""

    neighbors: int = option(10, "most similar items kept for each item", minimum=1)
    shrink: float = option(
        10.0, "added to the product of norms, damps items of small feature norm", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What report/index.html shows of single users."""

    num_users: int = option(6, "users whose recommendations are shown", minimum=0, maximum=50)
    min_history: int = option(5, "training items that such a user has at least", minimum=1)
    history: int = option(8, "training items shown of each user, newest first", minimum=1)
    recommendations: int = option(10, "recommended items shown of each user", minimum=1)
    thumbnail_side: int = option(200, "longer side of the pictures, pixels", minimum=16)


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """How models are ranked and what the report shows."""

    ks: tuple[int, ...] = option((5, 10, 20, 50), "list lengths of the metrics, items")
    block_users: int = option(
        1024, "users scored at a time; memory is this times items", minimum=1, affects_result=False
    )
    block_items: int = option(
        1024,
        "items compared at a time for item_cf; memory is this times items",
        minimum=1,
        affects_result=False,
    )
    item_cf: ItemCFConfig = option(ItemCFConfig(), "item-based filtering on content")
    report: ReportConfig = option(ReportConfig(), "the HTML page")

    def __post_init__(self) -> None:
        if not self.ks or min(self.ks) < 1 or sorted(set(self.ks)) != list(self.ks):
            raise UserError(
                f"evaluation.ks={list(self.ks)} must be ascending positive list lengths without "
                f"repetition, else metrics would overwrite each other. For example [5, 10, 20, 50]."
            )

    @property
    def headline_k(self) -> int:
        """The k of the printed margins: 20 as in the literature, else the largest."""
        return 20 if 20 in self.ks else max(self.ks)
