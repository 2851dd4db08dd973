"""Shapes of an encoder, without torch, for configuration and planning."""

import dataclasses

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
