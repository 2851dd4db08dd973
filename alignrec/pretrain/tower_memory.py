"""What towers keep for the backward pass: a forward pass of tensors without content (-> memory)."""

import functools
import json
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.initialization import no_init_weights

from alignrec import configuration
from alignrec.pretrain.architecture import TowersArchitecture
from alignrec.pretrain.towers import Towers

_ITEMS = 2  # one item alone makes some copies unnecessary


def saved_numbers(architecture: TowersArchitecture) -> int:
    """Return how many numbers the towers and bridges keep of one item; frozen towers keep none."""
    return _saved_numbers(json.dumps(configuration.to_mapping(architecture)))


@functools.cache
def _saved_numbers(mapping: str) -> int:
    architecture = configuration.build(
        TowersArchitecture, json.loads(mapping), section="architecture"
    )
    kept: dict[int, Any] = {}  # storages stay alive, so that no address comes twice

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = (storage, tensor.element_size())
        return tensor

    size, length = architecture.image_size, architecture.max_text_tokens
    with FakeTensorMode(), no_init_weights():  # some draw until a number is within bounds
        towers = Towers(architecture)
        own = {p.untyped_storage()._cdata for p in (*towers.parameters(), *towers.buffers())}
        images = torch.zeros(_ITEMS, size, size, 3, dtype=torch.uint8)
        tokens = torch.zeros(_ITEMS, length, dtype=torch.int64)
        padding = torch.zeros(_ITEMS, length, dtype=torch.bool)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            # the results are held, as the fusion holds them
            results = (
                towers.vision_bridge(towers.vision_tower(images, None, torch.float32)),
                towers.text_bridge(towers.text_tower(tokens, padding)),
            )
    assert len(results) == len(("vision", "text"))
    numbers: int = sum(s.nbytes() // size for a, (s, size) in kept.items() if a not in own)
    return numbers // _ITEMS
