"""torch.compile where it works (training)."""

import warnings

import torch
from torch import Tensor

from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.objective import MaskedModel


def compile_layers(model: MaskedModel, config: PretrainConfig) -> str | None:
    """Compile the encoder's layers in place, if asked for.

    Returns:
        Why they stay as they are, although it was asked for; None otherwise.
    """
    if not config.compile:
        return None
    if config.zero_stage == 3:
        return (
            "not compiled: under ZeRO-3 DeepSpeed gathers parameters in hooks inside of the layers"
        )
    if fault := compiler_fault():
        return f"not compiled: {fault}"
    for layer in model.encoder.encoder.layers:
        layer.compile(dynamic=True)  # texts differ in length from batch to batch
    return None


def compiler_fault() -> str | None:
    """Return why nothing can be compiled on this host, or None."""
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's notes to its own developers
            torch.compile(_probe)(torch.ones(4))
    except Exception as error:  # no compiler, no headers, no writable cache, ...
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _probe(x: Tensor) -> Tensor:
    return x.sin() + x.cos()
