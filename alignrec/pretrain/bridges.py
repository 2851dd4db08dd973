"""Projections to start from, between towers and fusion: main directions (dataset -> training).

A random projection of a wide tower to a narrower fusion blurs every angle. The principal components
of what the tower says about the catalogue keep most of it; and without the mean that all places
share, the fusion's attention sees how they differ.
"""

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec.data.loader import ItemReader, MicroBatch
from alignrec.pretrain.architecture import Architecture, TowersArchitecture
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data
from alignrec.pretrain.initial import INITIAL, read_initial
from alignrec.pretrain.tokenizer import Words
from alignrec.pretrain.towers import Towers
from alignrec.telemetry import Telemetry

BRIDGES = "bridges.safetensors"
MAX_ITEMS = 512
_BATCH = 16
_BATCHES_BETWEEN = 4  # batches after which the moments are kept
_MOMENTS = "moments.safetensors"
_TINY = 1e-12


class Moments:
    """Sums over places from which mean and covariance follow, in float64."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self.sum = torch.zeros(width, dtype=torch.float64)
        self.products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, states: Float[Tensor, "places width"]) -> None:
        """Take in a batch."""
        values = states.double().cpu()
        self.count += len(values)
        self.sum += values.sum(dim=0)
        self.products += values.T @ values

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the sums as tensors to keep, under names that begin with ``name``."""
        count = torch.tensor(self.count)
        return {f"{name}.count": count, f"{name}.sum": self.sum, f"{name}.products": self.products}

    @classmethod
    def of(cls, kept: dict[str, Tensor], name: str) -> "Moments":
        """Return what ``tensors`` kept."""
        found = cls(len(kept[f"{name}.sum"]))
        found.count = int(kept[f"{name}.count"])
        found.sum, found.products = kept[f"{name}.sum"], kept[f"{name}.products"]
        return found

    def projection(
        self, outputs: int, generator: torch.Generator
    ) -> tuple[Float[Tensor, "outputs width"], Float[Tensor, " outputs"]] | None:
        """Return weight and bias of a linear layer, or None where nothing was seen.

        The result has mean 0 and mean square 1 over all places and columns. The random basis of
        the main directions spreads the few strong ones over all columns, and depends on the space
        that they span alone, not on their signs, which rounding decides.
        """
        mean = self.sum / max(self.count, 1)
        covariance = self.products / max(self.count, 1) - mean.outer(mean)
        strength, directions = torch.linalg.eigh(covariance)
        inputs = len(mean)
        kept = min(outputs, inputs)
        energy = float(strength[-kept:].clamp(min=0.0).sum())
        if self.count == 0 or energy <= _TINY:
            return None
        noise = torch.randn(inputs, outputs, generator=generator, dtype=torch.float64)
        if outputs < inputs:
            main = directions[:, -kept:]
            basis = torch.linalg.qr(main @ (main.T @ noise))[0].T  # (outputs, inputs)
        else:
            basis = torch.linalg.qr(noise.T)[0]
        weight = basis * (outputs / energy) ** 0.5
        return weight.float().contiguous(), -(weight @ mean).float()


def prepare_bridges(
    config: PretrainConfig,
    architecture: Architecture,
    words: Words,
    dataset: Path,
    work: Path,
    *,
    device: torch.device,
    telemetry: Telemetry,
) -> None:
    """Write both projections, where there are towers and nothing else decides (rank 0 calls it).

    Args:
        config: settings of the run.
        architecture: resolved shapes.
        words: the tokenizer.
        dataset: artifact of which at most ``MAX_ITEMS`` training items are read.
        work: folder with the towers' weights, in which the projections are written.
        device: where the towers compute.
        telemetry: shows how far it is.
    """
    if config.encoder.kind != "towers" or config.initial.checkpoint is not None:
        return
    if (work / BRIDGES).exists():
        return
    assert isinstance(architecture, TowersArchitecture)
    towers = Towers(architecture)
    weights = {n.removeprefix("encoder."): t for n, t in read_initial(work / INITIAL).items()}
    towers.load_state_dict(weights, strict=False)
    with contextlib.closing(open_training_data(dataset, config, words, num_ranks=1)) as data:
        rows = data.split.train[:: -(-len(data.split.train) // MAX_ITEMS)]
        telemetry.say(f"fitting the projections of both towers to {len(rows):,} items")
        with telemetry.progress(len(rows), "items") as progress:
            found = fit(
                towers.to(device),
                data.whole_reader,
                rows,
                config.seed,
                progress.update,
                state=work / _MOMENTS,
            )
    _write({f"encoder.{name}": tensor for name, tensor in found.items()}, work / BRIDGES)


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    spare = file.with_suffix(".writing")
    save_file(tensors, spare)
    spare.replace(file)


def read_bridges(work: Path) -> dict[str, Tensor]:
    """Read what ``prepare_bridges`` wrote, if anything, under the names of the whole model."""
    file = work / BRIDGES
    return load_file(file) if file.exists() else {}


@torch.no_grad()
def fit(
    towers: Towers,
    reader: ItemReader,
    rows: npt.NDArray[np.int64],
    seed: int,
    progress: Callable[[int], None],
    *,
    state: Path,
) -> dict[str, Tensor]:
    """Return weights and biases of the two projections; of an absent modality none.

    Args:
        towers: whose states are looked at.
        reader: of the items.
        rows: of the items.
        seed: of the random basis.
        progress: is told how many items were read.
        state: file that a killed call leaves and the next one goes on from.
    """
    bridges = {"vision_bridge": towers.vision_bridge, "text_bridge": towers.text_bridge}
    moments = {name: Moments(bridge.proj.in_features) for name, bridge in bridges.items()}
    device = towers.mask_token.device
    done = 0
    if state.exists():
        kept = load_file(state)
        done = int(kept["done"])
        moments = {name: Moments.of(kept, name) for name in moments}
        progress(done)
    for start in range(done, len(rows), _BATCH):
        batch = reader.read(MicroBatch(0, rows[start : start + _BATCH]))
        padding = torch.from_numpy(batch.text_padding).to(device)
        pictures = towers.vision_tower(
            torch.from_numpy(batch.images).to(device), None, towers.mask_token.dtype
        )
        texts = towers.text_tower(torch.from_numpy(batch.tokens).to(device), padding)
        has_image = torch.from_numpy(batch.has_image).to(device)
        seen = {"vision_bridge": pictures[has_image].flatten(0, 1), "text_bridge": texts[~padding]}
        for name, states in seen.items():
            moments[name].add(bridges[name].norm(states))
        progress(len(batch.item_index))
        if start // _BATCH % _BATCHES_BETWEEN == _BATCHES_BETWEEN - 1:
            keep = {"done": torch.tensor(start + _BATCH)}
            for name, sums in moments.items():
                keep |= sums.tensors(name)
            _write(keep, state)
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Tensor] = {}
    for name, bridge in bridges.items():
        found = moments[name].projection(bridge.proj.out_features, generator)
        if found is not None:
            result |= dict(zip((f"{name}.proj.weight", f"{name}.proj.bias"), found, strict=True))
    return result
