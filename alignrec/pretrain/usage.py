"""What training gets out of a device: model FLOPs a second, share of its peak, memory (telemetry).

FLOPs that the model needs, whatever a run computes beside them (recomputed layers do not count), of
an item with v vision positions and t tokens, p of which the heads read, N layers of width d and
inner size h:

    layers   (v + t) (N (8 d^2 + 4 d h) - l)  +  p l,  l = 4 d^2 + 4 d h being what the last layer
             computes only for what is read; attention 4 d (v + t) ((N - 1) (v + t) + p)
    picture  2 d x values of a patch, for each patch
    heads    2 d x vocabulary for each masked token, 2 d x outputs for each masked patch; with the
             summary one token and each masked patch more, and its own two layers
    a step   3 x this: backward costs twice as much as forward
"""

import dataclasses
import resource
import sys
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from alignrec.pretrain.architecture import TowersArchitecture
from alignrec.pretrain.objective import MaskedBatch, MaskedModel

TERA = 1e12
GIBIBYTE = 2**30
# Dense peaks in TFLOP/s as the makers state them: part of the name -> (bf16, fp32 without TF32).
# The first that is found counts.
_PEAKS = {
    "B200": (2250.0, 75.0),
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "A800": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "RTX 4090": (165.0, 82.6),
}
_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True)
class FlopCounter:
    """Forward FLOPs by what they are spent for.

    Attributes:
        position: of a position in all layers, but for attention.
        pair: of a position that attends to another, in a layer.
        full_layers: layers in which all positions attend; in the last one those that are read.
        patch: of a patch that is embedded.
        masked_token: of a token's place in the last layer and its prediction.
        masked_patch: of a patch's place in the last layer and all its predictions.
        item: of an item's summary and the CLS state that it is made from.
        num_patches: of a picture.
        summaries: read of an item's CLS state, 0 or 1.
    """

    position: float
    pair: float
    full_layers: int
    patch: float
    masked_token: float
    masked_patch: float
    item: float
    num_patches: int
    summaries: int

    @classmethod
    def of(cls, model: MaskedModel) -> "FlopCounter | None":
        """Count the multiway transformer's; None for towers, whose models may be anything."""
        shapes = model.encoder.architecture
        if isinstance(shapes, TowersArchitecture):
            return None
        width, layers = shapes.width, shapes.num_layers
        token_head = 2.0 * width * shapes.vocabulary_size
        patch_head = 2.0 * width * model.mim_head.out_features
        summaries = 0 if model.summary is None else 1
        last = 4.0 * width**2 + 4.0 * width * shapes.hidden
        return cls(
            position=layers * (4.0 * width**2 + last) - last,
            pair=4.0 * width,
            full_layers=layers - 1,
            patch=2.0 * width * shapes.patch_values,
            masked_token=last + token_head,
            masked_patch=last + (1 + summaries) * patch_head,
            item=summaries * (last + token_head + 4.0 * width**2),
            num_patches=shapes.num_patches,
            summaries=summaries,
        )

    def step(self, batch: MaskedBatch) -> Float[Tensor, ""]:
        """Return the FLOPs of forward and backward of a micro batch, on its device."""
        pictures = batch.has_image.double() * self.num_patches
        positions = 1 + pictures + (~batch.text_padding).sum(dim=1)  # (batch,)
        items = batch.item_index >= 0
        tokens, patches = batch.masked_text.sum(dim=1), batch.masked_patches.sum(dim=1)
        read = tokens + patches + self.summaries * items
        forward = (
            self.position * positions.sum()
            + self.pair * (positions * (self.full_layers * positions + read)).sum()
            + self.patch * pictures.sum()
            + self.masked_token * tokens.sum()
            + self.masked_patch * patches.sum()
            + self.item * items.sum()
        )
        return 3.0 * forward


def peak_flops(device_name: str, *, precision: str) -> float | None:
    """Return a GPU's dense peak in FLOP/s; None for a device that is not known."""
    for part, (bf16, fp32) in _PEAKS.items():
        if part in device_name:
            return TERA * (bf16 if precision == "bf16" else fp32)
    return None


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; of a CPU, whose peak no name tells, "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory so far: tensors on a GPU, on a CPU the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if _STATUS.exists():  # getrusage would also count what the process was started from
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def usage(
    flops_per_second: float | None, *, device: torch.device, precision: str, num_ranks: int
) -> dict[str, float]:
    """Return what is told of a device's use.

    Args:
        flops_per_second: model FLOPs of all ranks together; None where they are not counted.
        device: of this rank.
        precision: "fp32" or "bf16".
        num_ranks: ranks that share the FLOPs.

    Returns:
        ``peak_memory_gib`` of this rank, ``model_tflops`` a second of all ranks where FLOPs are
        counted, and ``mfu``, their share of what the devices could do, on GPUs that are known.
    """
    told = {"peak_memory_gib": peak_memory_bytes(device) / GIBIBYTE}
    if flops_per_second is None:
        return told
    told["model_tflops"] = flops_per_second / TERA
    peak = peak_flops(device_name(device), precision=precision)
    if peak is not None:
        told["mfu"] = flops_per_second / (num_ranks * peak)
    return told
