"""Weights to start from: BEiT-3's checkpoints and encoders trained here (files -> training).

Rank 0 reads the checkpoint once, checks it against the model, fits the picture's positions to the
resolution and leaves plain safetensors under our parameter names for all ranks.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec.errors import UserError
from alignrec.pretrain.architecture import Architecture, TowersArchitecture
from alignrec.pretrain.checkpoint_files import Tensors, read_tensor_file, some
from alignrec.pretrain.config import EncoderConfig, PretrainConfig
from alignrec.pretrain.encoder import WEIGHTS
from alignrec.pretrain.multiway import POSITION_OFFSET
from alignrec.pretrain.objective import MaskedModel
from alignrec.pretrain.targets import PictureTarget

INITIAL = "initial.safetensors"
TOKEN_EMBEDDINGS = "encoder.text_embed.weight"  # noqa: S105 - a parameter's name
POSITIONS = "encoder.encoder.embed_positions.A.weight"
_PICTURE_HEAD = "mim_head."
_HEADS = ("mlm_head.", _PICTURE_HEAD)
_OFFICIAL = "beit3."  # prefix of the encoder in microsoft/unilm's checkpoints


@dataclasses.dataclass(frozen=True)
class Initial:
    """Parameters taken from a checkpoint, and what became of the rest.

    Attributes:
        tensors: name in ``MaskedModel`` -> fp32 value.
        fresh: parameters that the checkpoint does not decide.
        left_out: tensors of the checkpoint that this model has no place for (other heads).
    """

    tensors: Tensors
    fresh: tuple[str, ...]
    left_out: tuple[str, ...]


def has_initial(config: PretrainConfig) -> bool:
    """Whether a run starts from given weights."""
    return config.initial.checkpoint is not None or config.encoder.kind == "towers"


def write_initial(
    config: PretrainConfig,
    architecture: Architecture,
    target: Path,
    *,
    picture: PictureTarget | None = None,
) -> str:
    """Write the weights to start from by rename and return a line about them (rank 0 calls it).

    Args:
        config: settings.
        architecture: resolved shapes, for the tokens of the tokenizer.
        target: file to write.
        picture: what the picture head predicts; without one, pixels.

    Raises:
        UserError: the checkpoint or a tower cannot be read or does not fit.
    """
    if config.initial.checkpoint is None:
        tensors = _tower_tensors(config.encoder, architecture)
        _write(tensors, target)
        return (
            f"starts from {config.encoder.vision} and {config.encoder.text}: {len(tensors)} tensors"
        )
    return _write_checkpoint(config, config.initial.checkpoint, architecture, target, picture)


def _tower_tensors(config: EncoderConfig, architecture: Architecture) -> Tensors:
    from alignrec.pretrain.tower_models import read_weights  # transformers takes seconds to import

    assert config.vision is not None
    assert config.text is not None
    assert isinstance(architecture, TowersArchitecture)
    read = {
        "vision": read_weights(config.vision, "vision", commit=architecture.vision.commit),
        "text": read_weights(config.text, "text", commit=architecture.text.commit),
    }
    return {
        f"encoder.{modality}_tower.model.{name}": tensor.contiguous()
        for modality, tensors in read.items()
        for name, tensor in tensors.items()
    }


def _write(tensors: Tensors, target: Path) -> None:
    spare = target.with_suffix(".writing")
    save_file(tensors, spare)
    spare.replace(target)


def _write_checkpoint(
    config: PretrainConfig,
    checkpoint: Path,
    architecture: Architecture,
    target: Path,
    picture: PictureTarget | None,
) -> str:
    tensors = rename(read_tensors(checkpoint))
    found = fit(tensors, config, architecture, source=checkpoint, picture=picture)
    _write(found.tensors, target)
    parts = [f"starts from {checkpoint}: {len(found.tensors)} tensors"]
    if found.fresh:
        parts.append(f"drawn anew: {some(found.fresh)}")
    if found.left_out:
        parts.append(f"left out: {some(found.left_out)}")
    return "; ".join(parts)


def read_initial(path: Path) -> Tensors:
    """Read what ``write_initial`` wrote."""
    return load_file(path)


def read_tensors(path: Path) -> Tensors:
    """Read a checkpoint, or that of an encoder artifact, without running anything that is in it.

    Raises:
        UserError: it is absent, damaged, or holds more than tensors.
    """
    file = path / WEIGHTS if path.is_dir() else path
    return read_tensor_file(file, setting="pretrain.initial.checkpoint", give="BEiT-3's .pth")


def rename(tensors: Tensors) -> Tensors:
    """Return official names (``beit3.*``) or an artifact's (no prefix) as those of our model."""
    official = any(name.startswith(_OFFICIAL) for name in tensors)
    prefix = _OFFICIAL if official else ""
    result = {}
    for name, tensor in tensors.items():
        own = name.startswith(prefix) and not name.startswith(_HEADS)
        result[f"encoder.{name.removeprefix(prefix)}" if own else name] = tensor
    return result


def fit(
    tensors: Tensors,
    config: PretrainConfig,
    architecture: Architecture,
    *,
    source: Path,
    picture: PictureTarget | None,
) -> Initial:
    """Choose the tensors that the model takes over, positions fitted to its resolution.

    Raises:
        UserError: encoder tensors are missing, unknown or of other shapes, or the tokenizer has
            more words than the checkpoint.
    """
    rows = len(tensors.get(TOKEN_EMBEDDINGS, range(architecture.vocabulary_size)))
    _refuse_more_words(architecture.vocabulary_size, rows, source)
    architecture = dataclasses.replace(architecture, vocabulary_size=rows)
    if POSITIONS in tensors:
        tensors = tensors | {POSITIONS: fit_positions(tensors[POSITIONS], architecture)}
    with torch.device("meta"):
        model = MaskedModel(architecture, config.objective, picture)
    expected = {name: p.shape for name, p in model.named_parameters()}
    frozen = model.encoder.frozen_state()
    expected |= {f"encoder.{name}": tensor.shape for name, tensor in frozen.items()}
    _refuse_misfits(tensors, expected, source)
    # the codes of another codebook have nothing to do with BEiT-3's, also where they are as many
    drawn: tuple[str, ...] = _HEADS if config.initial.heads == "fresh" else ()
    if config.objective.targets != "vqkd":
        drawn = (*drawn, _PICTURE_HEAD)
    kept = {
        name: tensor.float().contiguous()
        for name, tensor in tensors.items()
        if expected.get(name) == tensor.shape and not name.startswith(drawn)
    }
    return Initial(
        tensors=kept,
        fresh=tuple(name for name in expected if name not in kept),
        left_out=tuple(name for name in tensors if name not in kept),
    )


def fit_positions(
    positions: Float[Tensor, "rows width"], architecture: Architecture
) -> Float[Tensor, "fitted width"]:
    """Return a picture's position embeddings for another number of patches.

    Those of the patches are interpolated (bicubic, as BEiT-3's fine-tuning does); the rows before
    them, two unused and CLS, stay.
    """
    first = POSITION_OFFSET + 1
    grid, side = positions[first:].float(), architecture.patches_per_side
    before = math.isqrt(len(grid))
    if before == side or before**2 != len(grid) or before == 0:
        return positions
    picture = grid.T.reshape(1, -1, before, before)
    fitted = F.interpolate(picture, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([positions[:first].float(), fitted.flatten(2)[0].T])


def _refuse_more_words(num_words: int, rows: int, source: Path) -> None:
    if rows < num_words:
        raise UserError(
            f"pretrain.tokenizer.path has {num_words} tokens, but {source} has "
            f"embeddings for {rows}: some would have none. Give the tokenizer that the checkpoint "
            f"was trained with."
        )


def _refuse_misfits(tensors: Tensors, expected: Mapping[str, torch.Size], source: Path) -> None:
    """Tell all that keeps the encoder's tensors from fitting in one message."""
    wanted = {name for name in expected if name.startswith("encoder.")}
    given = {name for name in tensors if name.startswith("encoder.")}
    shapes = [
        f"{name} {tuple(tensors[name].shape)} for {tuple(expected[name])}"
        for name in sorted(wanted & given)
        if tensors[name].shape != expected[name]
    ]
    faults = {
        "missing": sorted(wanted - given),
        "unknown": sorted(given - wanted),
        "of other shapes": shapes,
    }
    told = [f"{len(names)} {fault} ({some(names)})" for fault, names in faults.items() if names]
    if told:
        raise UserError(
            f"the tensors of {source} do not fit pretrain.encoder: {'; '.join(told)}. "
            f"{_sizes_of(tensors)}"
        )


def _sizes_of(tensors: Tensors) -> str:
    """Say which settings the checkpoint was made with, as far as its shapes tell."""
    layers = {
        int(name.split(".")[3]) for name in tensors if name.startswith("encoder.encoder.layers.")
    }
    embedding = tensors.get(TOKEN_EMBEDDINGS)
    inner = tensors.get("encoder.encoder.layers.0.ffn.A.fc1.weight")
    patches = tensors.get("encoder.vision_embed.proj.weight")
    if any(name.startswith("encoder.vision_tower.") for name in tensors):
        return (
            f"The checkpoint was made with kind: towers and num_layers: {len(layers)}; set "
            f"pretrain.encoder as its encoder.json says, over the same models."
        )
    if embedding is None or inner is None or patches is None or patches.ndim != 4:
        return "It is no BEiT-3 encoder; give one of its published checkpoints."
    return (
        f"The checkpoint was made with kind: multiway, num_layers: {len(layers)}, width: "
        f"{embedding.shape[1]}, hidden: {len(inner)}, patch_size: {patches.shape[-1]}; set "
        f"pretrain.encoder to that."
    )
