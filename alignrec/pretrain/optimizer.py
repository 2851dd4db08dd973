"""What the optimizer is given: which parameters decay, and how fast each layer learns (engine)."""

import re
from typing import Any

from torch import nn

_LAYER = re.compile(r"encoder\.encoder\.layers\.(\d+)\.")
_TOWERS = ("encoder.vision_tower.", "encoder.text_tower.")
_EMBEDDINGS = (
    *_TOWERS,
    "encoder.text_embed.",
    "encoder.vision_embed.",
    "encoder.encoder.embed_positions.",
    # of a fusion over towers: what its first layer reads
    "encoder.vision_bridge.",
    "encoder.text_bridge.",
    "encoder.cls_token",
    "encoder.mask_token",
)


def parameter_groups(
    model: nn.Module, weight_decay: float, *, layer_decay: float = 1.0, tower_rate: float = 1.0
) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices with weight decay, vectors (biases, norms, CLS) without.

    Args:
        model: the model with its heads.
        weight_decay: of matrices.
        layer_decay: ``rate_share`` of a group is layer_decay ** (layers above it): 1 for the heads
            and the last LayerNorm, least for the embeddings (Clark et al. 2020, as BEiT does).
            Towers and their bridges lie below all layers.
        tower_rate: what ``rate_share`` of towers is multiplied with.
    """
    num_layers = 1 + max((depth_of(name) or 0 for name, _ in model.named_parameters()), default=0)
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        is_matrix = max(parameter.shape) != parameter.numel()
        depth = depth_of(name)
        above = 0 if depth is None else num_layers - depth
        share = layer_decay**above * (tower_rate if name.startswith(_TOWERS) else 1.0)
        groups.setdefault((share, is_matrix), []).append(parameter)
    # matrices first, the top of the model first: the order of groups is part of float summation
    return [
        {
            "params": parameters,
            "weight_decay": weight_decay if is_matrix else 0.0,
            "rate_share": share,
        }
        for (share, is_matrix), parameters in sorted(
            groups.items(), key=lambda group: (not group[0][1], -group[0][0])
        )
    ]


def depth_of(name: str) -> int | None:
    """Return how many layers a parameter lies above the input: 0 for embeddings, None above all."""
    if name.startswith(_EMBEDDINGS):
        return 0
    found = _LAYER.match(name)
    return int(found.group(1)) + 1 if found else None
