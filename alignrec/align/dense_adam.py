"""Adam over the parameters that are whole on this rank (gradients -> parameters)."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ADAM = "adam/"  # what names of its tensors in a checkpoint begin with


class DenseAdam:
    """Fused Adam whose state goes to checkpoints as plain tensors; a module may be empty."""

    def __init__(self, module: nn.Module) -> None:
        self._named = dict(module.named_parameters())
        self._optimizer = (
            torch.optim.Adam(list(self._named.values()), fused=True) if self._named else None
        )

    def step(self, learning_rate: float) -> None:
        """Update by the gradients and forget them."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the state by name."""
        if self._optimizer is None:
            return {}
        return {
            f"{ADAM}{name}/{key}": value
            for name, parameter in self._named.items()
            for key, value in self._optimizer.state[parameter].items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from what ``tensors`` returned; other names are left alone."""
        if self._optimizer is None:
            return
        for name, parameter in self._named.items():
            self._optimizer.state[parameter] = below(f"{ADAM}{name}/", tensors)


def below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    return {n.removeprefix(prefix): v for n, v in tensors.items() if n.startswith(prefix)}
