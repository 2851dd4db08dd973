"""How far the trained model is ahead of the others, and how sure that is (metrics -> report)."""

import dataclasses
import math
from collections.abc import Mapping

from jaxtyping import Float64
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Margin:
    """Difference of two models' means over the same users.

    Attributes:
        over: the other model.
        difference: own mean minus the other's.
        relative: difference / the other's mean; None where that is 0.
        error: standard error of the difference, from the differences of single users; None where
            there is one user.
    """

    over: str
    difference: float
    relative: float | None
    error: float | None

    @property
    def words(self) -> str:
        """Return e.g. "+0.0123 ± 0.0010 (+14.2 %)"."""
        return f"{self.absolute_words} ({self.relative_words})"

    @property
    def absolute_words(self) -> str:
        """Return e.g. "+0.0123 ± 0.0010"."""
        sure = "" if self.error is None else f" ± {self.error:.4f}"
        return f"{self.difference:+.4f}{sure}"

    @property
    def relative_words(self) -> str:
        """Return e.g. "+14.2 %"."""
        return "from 0" if self.relative is None else f"{100 * self.relative:+.1f} %"


def margins(
    by_user: Mapping[str, Float64[Tensor, " num_users"]], own: str = "alignrec"
) -> dict[str, Margin]:
    """Compare one model with every other.

    Args:
        by_user: model -> the metric of each user, the same users in the same order.
        own: the model that is compared.
    """
    result = {}
    for name, values in by_user.items():
        if name != own:
            differences = by_user[own] - values
            mean, other = differences.mean().item(), values.mean().item()
            num_users = differences.numel()
            error = differences.std().item() / math.sqrt(num_users) if num_users > 1 else None
            result[name] = Margin(name, mean, mean / other if other else None, error)
    return result
