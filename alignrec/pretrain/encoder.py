"""The content encoder: picture and text of an item in, hidden states and one feature out.

``Encoder`` is BEiT-3 (Wang et al. 2023) as torchscale's ``model/BEiT3.py`` builds it, with its
parameter names; ``towers.Towers`` is the other kind.
"""

import abc
import dataclasses
import json
import math
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Int64, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from alignrec import artifacts, configuration
from alignrec.errors import UserError
from alignrec.pretrain.architecture import CHANNELS, Architecture, TowersArchitecture
from alignrec.pretrain.multiway import POSITION_OFFSET, MultiwayEncoder, Streams

ARCHITECTURE = "encoder.json"
WEIGHTS = "encoder.safetensors"
Pooling = Literal["cls", "mean", "all"]
Modality = Literal["image", "text"]


class PatchProjection(nn.Conv2d):
    """The strided convolution of a vision transformer as a matrix product over given patches."""

    def forward(self, patches: Float[Tensor, "batch patches values"]) -> Tensor:
        """Return (batch, patches, width)."""
        return F.linear(patches.to(self.weight.dtype), self.weight.flatten(1), self.bias)


class VisionEmbedding(nn.Module):
    """Patches to vectors, masked ones replaced by a learned vector, a CLS vector in front."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size, width = architecture.patch_size, architecture.width
        self.proj = PatchProjection(CHANNELS, width, kernel_size=size, stride=size)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))

    def forward(
        self,
        patches: Float[Tensor, "batch patches values"],
        masked: Bool[Tensor, "batch patches"] | None,
    ) -> Tensor:
        """Return (batch, 1 + patches, width)."""
        x = self.proj(patches)
        if masked is not None:
            x = torch.where(masked[..., None], self.mask_token.to(x.dtype), x)
        return torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], dim=1)


@dataclasses.dataclass(frozen=True)
class FeaturePart:
    """Columns of a feature that describe one thing.

    Attributes:
        of: the modality that they describe; None: the item.
        width: number of columns.
    """

    of: Modality | None
    width: int


class ContentEncoder(nn.Module, abc.ABC):
    """What every kind of encoder is to the objective, the engine and the features.

    Attributes:
        architecture: its shapes.
        encoder: the multiway transformer on top.
    """

    architecture: Architecture
    encoder: MultiwayEncoder

    @abc.abstractmethod
    def forward(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        has_image: Bool[Tensor, " batch"],
        tokens: Int64[Tensor, "batch length"],
        text_padding: Bool[Tensor, "batch length"],
        masked_patches: Bool[Tensor, "batch patches"] | None = None,
        wanted: Streams | None = None,
    ) -> Streams:
        """Encode items; patches of an absent picture and padded tokens are not attended to.

        With ``wanted`` (masks of both streams) the states of other positions are zero.
        """

    @abc.abstractmethod
    def reset_parameters(self) -> None:
        """Draw all parameters from torch's default generator."""

    def feature_parts(self, pooling: Pooling) -> list[FeaturePart]:
        """Return what the columns of ``features`` describe, in their order."""
        owners: dict[Pooling, list[Modality | None]] = {
            "cls": [None],
            "mean": ["image", "text"],
            "all": ["image", "text", None],
        }
        return [FeaturePart(owner, self.architecture.width) for owner in owners[pooling]]

    def features(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        has_image: Bool[Tensor, " batch"],
        tokens: Int64[Tensor, "batch length"],
        text_padding: Bool[Tensor, "batch length"],
        *,
        pooling: Pooling,
    ) -> Float[Tensor, "batch dim"]:
        """Return one content feature per item.

        Args:
            images: pixels.
            has_image: whether the item has a picture.
            tokens: token ids.
            text_padding: True where no token is.
            pooling: "cls": the CLS state, as in the paper. "mean": mean of the patch states beside
                the mean of the token states; an absent half is zero. "all": these two, then the CLS
                state, then what only this kind of encoder has.
        """
        return pool(
            self(images, has_image, tokens, text_padding), has_image, text_padding, pooling=pooling
        )

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the weights that are no parameters, because they never change."""
        return {}

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Round these weights to the format in which the others compute; here there are none."""


class Encoder(ContentEncoder):
    """BEiT-3: multiway transformer over [CLS, patches, text tokens]."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.text_embed = nn.Embedding(architecture.vocabulary_size, architecture.width)
        self.vision_embed = VisionEmbedding(architecture)
        self.encoder = MultiwayEncoder(
            width=architecture.width,
            num_layers=architecture.num_layers,
            num_heads=architecture.num_heads,
            hidden=architecture.hidden,
            num_vision_positions=architecture.num_patches + 1 + POSITION_OFFSET,
            num_text_positions=architecture.num_text_positions,
        )

    def forward(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        has_image: Bool[Tensor, " batch"],
        tokens: Int64[Tensor, "batch length"],
        text_padding: Bool[Tensor, "batch length"],
        masked_patches: Bool[Tensor, "batch patches"] | None = None,
        wanted: Streams | None = None,
    ) -> Streams:
        """Encode items; patches of an absent picture and padded tokens are not attended to.

        The CLS position is always attended to, so an item with neither picture nor text gets a
        finite, meaningless state instead of NaN.
        """
        patches = patchify(images, self.architecture.patch_size)
        vision = self.vision_embed(patches, masked_patches)
        absent = ~has_image[:, None].expand(-1, vision.shape[1])
        vision_padding = absent.clone()
        vision_padding[:, 0] = False
        streams = Streams(vision, self.text_embed(tokens))
        result: Streams = self.encoder(streams, vision_padding, text_padding, wanted)
        return result

    def reset_parameters(self) -> None:
        """Draw all parameters from torch's default generator."""
        nn.init.normal_(self.text_embed.weight, std=self.architecture.width**-0.5)
        self.encoder.reset_parameters()


def patchify(
    images: UInt8[Tensor, "batch size size 3"], patch_size: int
) -> Float[Tensor, "batch patches values"]:
    """Cut pictures into patches and scale pixels to -1 .. 1 (mean = std = 0.5).

    Values of a patch come in the order (channel, row, column) of a convolution's weight.
    """
    return cut_patches(images, patch_size).float() / 127.5 - 1.0


def cut_patches(
    images: UInt8[Tensor, "batch size size 3"], patch_size: int
) -> UInt8[Tensor, "batch patches values"]:
    """Cut pictures into patches, pixels as they are.

    Values of a patch come in the order (channel, row, column) of a convolution's weight.
    """
    batch, size = images.shape[:2]
    side = size // patch_size
    # (batch, grid, patch, grid, patch, 3) -> (batch, grid, grid, 3, patch, patch)
    grid = images.reshape(batch, side, patch_size, side, patch_size, CHANNELS)
    return grid.permute(0, 1, 3, 5, 2, 4).reshape(batch, side * side, -1)


def unpatchify(
    patches: Float[Tensor, "batch patches values"], patch_size: int
) -> UInt8[Tensor, "batch size size 3"]:
    """Undo ``patchify``, rounding and clipping to 0 .. 255."""
    batch, side = len(patches), math.isqrt(patches.shape[1])
    # (batch, grid, grid, 3, patch, patch) -> (batch, grid, patch, grid, patch, 3)
    grid = patches.reshape(batch, side, side, CHANNELS, patch_size, patch_size)
    images = grid.permute(0, 1, 4, 2, 5, 3).reshape(batch, side * patch_size, -1, CHANNELS)
    return ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)


def pool(
    streams: Streams,
    has_image: Bool[Tensor, " batch"],
    text_padding: Bool[Tensor, "batch length"],
    *,
    pooling: Pooling,
) -> Float[Tensor, "batch dim"]:
    """Pool the states of an encoder, see ``ContentEncoder.features``."""
    cls_state = streams.vision[:, 0]
    if pooling == "cls":
        return cls_state
    vision = streams.vision[:, 1:].mean(dim=1) * has_image[:, None]
    halves = [vision, mean_of(streams.text, ~text_padding)]
    return torch.cat(halves if pooling == "mean" else [*halves, cls_state], dim=1)


def mean_of(
    states: Float[Tensor, "batch places width"], kept: Bool[Tensor, "batch places"]
) -> Float[Tensor, "batch width"]:
    """Return the mean over the kept places; zero where there is none."""
    weight = kept[..., None].to(states.dtype)
    return (states * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)


def save_encoder(architecture: Architecture, folder: Path, state: dict[str, Tensor]) -> None:
    """Write ``encoder.json`` and ``encoder.safetensors`` (fp32)."""
    write_architecture(architecture, folder)
    save_file({name: t.float().contiguous() for name, t in state.items()}, folder / WEIGHTS)


def write_architecture(architecture: Architecture, folder: Path) -> None:
    """Write ``encoder.json``."""
    artifacts.write_json(folder / ARCHITECTURE, dataclasses.asdict(architecture))


def make_encoder(architecture: Architecture) -> ContentEncoder:
    """Return an encoder of the architecture's kind."""
    if isinstance(architecture, TowersArchitecture):
        from alignrec.pretrain.towers import Towers  # transformers takes seconds to import

        return Towers(architecture)
    return Encoder(architecture)


def load_encoder(folder: Path) -> ContentEncoder:
    """Return the encoder of an artifact, on CPU and in evaluation mode.

    Raises:
        UserError: the weights are damaged or do not fit the architecture.
    """
    encoder = make_encoder(read_architecture(folder))
    try:
        load_weights(encoder, load_file(folder / WEIGHTS))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{folder / WEIGHTS} does not hold the weights of {ARCHITECTURE} beside it "
            f"({str(error).splitlines()[0]}). Run pretrain again."
        ) from error
    return encoder.eval()


def read_architecture(folder: Path) -> Architecture:
    """Return the architecture that ``write_architecture`` left.

    As JSON: a reader of YAML takes the number 1e-12 for a text.

    Raises:
        UserError: it is absent or damaged.
    """
    path = folder / ARCHITECTURE
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}). Run pretrain again.") from error
    if not isinstance(mapping, dict):
        raise UserError(f"{path} holds no encoder's architecture. Run pretrain again.")
    kind = TowersArchitecture if mapping.get("kind") == "towers" else Architecture
    return configuration.build(kind, mapping, section=ARCHITECTURE)


def load_weights(encoder: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Set every parameter and frozen weight; buffers that follow from the shapes are left alone.

    Raises:
        RuntimeError: a name or a shape differs.
    """
    found = encoder.load_state_dict(tensors, strict=False)
    wanted = {name for name, _ in encoder.named_parameters()}
    for prefix, part in encoder.named_modules():
        if isinstance(part, ContentEncoder):
            wanted |= {f"{prefix}.{name}".removeprefix(".") for name in part.frozen_state()}
    missing = sorted(wanted & set(found.missing_keys))
    if missing or found.unexpected_keys:
        raise RuntimeError(
            f"{len(missing)} tensors are missing, {len(found.unexpected_keys)} unknown: "
            f"{', '.join([*missing, *found.unexpected_keys][:4])}"
        )
