"""Tensors from files of elsewhere, without running anything that is in them (-> initial, vqkd)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from alignrec.errors import UserError

_WRAPPERS = ("model", "module", "state_dict")
_NAMES_SHOWN = 4

Tensors = dict[str, Tensor]


def read_tensor_file(path: Path, *, setting: str, give: str) -> Tensors:
    """Read a checkpoint's tensors.

    Args:
        path: .safetensors, or what ``torch.save`` writes (.pth, .pt, .bin).
        setting: that names the file, for messages.
        give: which file would be right, for messages.

    Raises:
        UserError: it is absent, damaged, or holds more than tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(
            f"{setting}={path} cannot be read "
            f"({str(error).strip().partition(chr(10))[0]}). Give {give} as it is published, "
            f"or its tensors as .safetensors: anything but tensors is refused, since it could run."
        ) from error
    for name in _WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    if not isinstance(content, Mapping):
        content = {}
    tensors = {str(name): t for name, t in content.items() if isinstance(t, Tensor)}
    if not tensors:
        raise UserError(
            f"{setting}={path} holds no tensors by name. Give {give} as it is published."
        )
    return tensors


def some(names: Sequence[str]) -> str:
    """Return the first few names."""
    shown = ", ".join(names[:_NAMES_SHOWN])
    return shown + (f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else "")
