"""H_id of items without training interactions, from the items that their content resembles.

No interaction reaches such an item's ID embedding, so what propagation leaves of it says nothing
about who likes the item, and it is what CCA wants H_id to be near that is known: the content. The
item gets the mean direction of its similar items' H_id, and their mean length, because the mean of
vectors that point apart is short and short vectors are never recommended.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

PullSimilar = Callable[[Float[Tensor, "items d"]], Float[Tensor, "items d"]]


def fill_cold(
    item_id: Float[Tensor, "items d"], cold: Bool[Tensor, " items"], pull_similar: PullSimilar
) -> Float[Tensor, "items d"]:
    """Return H_id with the rows of cold items filled; zero where no similar item is warm.

    Args:
        item_id: H_id of items.
        cold: which of them have no training interaction.
        pull_similar: weighted sums over similar items; collective where items are on many ranks.
    """
    warm = (~cold).to(item_id).unsqueeze(1)
    length = item_id.norm(dim=1, keepdim=True)
    total = pull_similar(torch.cat([item_id * warm, length * warm, warm], dim=1))
    tiny = torch.finfo(total.dtype).tiny
    mean_length = total[:, -2:-1] / total[:, -1:].clamp(min=tiny)
    filled = functional.normalize(total[:, :-2], dim=1) * mean_length
    return torch.where(cold.unsqueeze(1), filled, item_id)
