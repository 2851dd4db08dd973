"""Shapes of an encoder, without torch, for configuration and planning."""

import dataclasses
from typing import Any, Literal

CHANNELS = 3


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What decides the shapes of an encoder's parameters and of its inputs.

    Attributes:
        num_layers: transformer layers.
        width: size of a hidden state.
        num_heads: attention heads; divides width.
        hidden: inner size of the feed-forward networks.
        image_size: side of the square picture in pixels.
        patch_size: side of a patch in pixels; divides image_size.
        vocabulary_size: rows of the token embedding.
        max_text_tokens: longest text in tokens, the two at its ends included.
        num_text_positions: rows of the text position embedding (two of them unused).
    """

    num_layers: int
    width: int
    num_heads: int
    hidden: int
    image_size: int
    patch_size: int
    vocabulary_size: int
    max_text_tokens: int = 128
    num_text_positions: int = 1024

    @property
    def patches_per_side(self) -> int:
        """Patches along one side of the picture."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return self.patches_per_side**2

    @property
    def patch_values(self) -> int:
        """Numbers in one patch: channels x height x width."""
        return CHANNELS * self.patch_size**2


@dataclasses.dataclass(frozen=True)
class VisionTower:
    """A vision model of transformers.

    Attributes:
        config: its own configuration, with model_type.
        width: size of its last hidden states.
        places_per_side: side of the square grid that they form.
        first_place: leading states that are no place of the grid (CLS, registers).
        interpolate: whether its positions are interpolated to the encoder's image_size.
        mean: of each channel, subtracted from pixels in 0 .. 1.
        std: of each channel, by which they are divided then.
        frozen: whether its weights stay as they are.
        commit: of the hub, from which it was read; None of a folder.
    """

    config: dict[str, Any]
    width: int
    places_per_side: int
    first_place: int
    interpolate: bool
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frozen: bool = False
    commit: str | None = None


@dataclasses.dataclass(frozen=True)
class TextTower:
    """A text model of transformers.

    Attributes:
        config: its own configuration, with model_type.
        width: size of its last hidden states.
        frozen: whether its weights stay as they are.
        commit: of the hub, from which it was read; None of a folder.
    """

    config: dict[str, Any]
    width: int
    frozen: bool = False
    commit: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowersArchitecture(Architecture):
    """A fusion transformer, whose shapes the base class tells, over the states of two towers.

    Attributes:
        vision: what reads the pictures.
        text: what reads the texts.
        kind: tells this architecture from the multiway transformer in ``encoder.json``.
    """

    vision: VisionTower
    text: TextTower
    kind: Literal["towers"] = "towers"
