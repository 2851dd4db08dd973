"""The second kind of encoder: a fusion transformer over the states of two transformers models.

The vision tower reads the picture, the text tower the tokens; both last hidden states are brought
to the fusion's width, and our multiway transformer attends over [CLS, patches, tokens]. The fusion
starts as near to nothing as it can: orthogonal projections, residual branches that add zero and a
CLS state that is the mean of what the towers say. So features start as good as the towers are.
"""

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from alignrec.pretrain.architecture import TextTower, TowersArchitecture, VisionTower
from alignrec.pretrain.encoder import ContentEncoder, FeaturePart, Pooling, mean_of, pool
from alignrec.pretrain.multiway import POSITION_OFFSET, MultiwayEncoder, Streams
from alignrec.pretrain.tower_models import freeze, make_model


class Tower(nn.Module):
    """A transformers model of which the last hidden states are used.

    It stays in evaluation mode, because its dropout would draw from a generator whose state depends
    on ranks and resumes.
    """

    def __init__(self, shape: VisionTower | TextTower) -> None:
        super().__init__()
        self.model = make_model(shape.config)
        self.places = [n for n, _ in self.model.named_parameters(remove_duplicate=False)]
        self.frozen_names = freeze(self.model) if shape.frozen else []
        self.train()

    def train(self, mode: bool = True) -> "Tower":  # noqa: ARG002 - torch's interface
        """Stay in evaluation mode."""
        super().train(mode=False)
        return self

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the frozen weights by name; empty where they are trained."""
        return {f"model.{name}": self.model.get_buffer(name) for name in self.frozen_names}

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Round the frozen weights; other buffers (frequencies, ids) stay as they are."""
        for name in self.places if self.frozen_names else ():
            buffer = self.model.get_buffer(name)
            buffer.data = buffer.data.to(dtype)


class VisionModel(Tower):
    """Pictures to one state per patch."""

    def __init__(self, architecture: TowersArchitecture) -> None:
        super().__init__(architecture.vision)
        self.shape = architecture.vision
        self.side = architecture.patches_per_side
        self.patch_size = architecture.patch_size

    def forward(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        masked: Bool[Tensor, "batch patches"] | None,
        dtype: torch.dtype,
    ) -> Float[Tensor, "batch patches width"]:
        """Return the states on the grid of patches; pixels of masked patches are not looked at."""
        pixels = self.pixels(images, masked).to(dtype)
        options = {"interpolate_pos_encoding": True} if self.shape.interpolate else {}
        states = self.model(pixel_values=pixels, **options).last_hidden_state
        side = self.shape.places_per_side
        if states.ndim == 4:  # (batch, width, side, side) of a convolutional model
            grid = states
        else:
            places = states[:, self.shape.first_place :]
            grid = places.transpose(1, 2).unflatten(2, (side, side))
        return resample(grid, self.side).flatten(2).transpose(1, 2)

    def pixels(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        masked: Bool[Tensor, "batch patches"] | None,
    ) -> Float[Tensor, "batch 3 size size"]:
        """Normalise pixels as the tower is used to; those of masked patches become its mean."""
        mean, std = (
            torch.tensor(v, device=images.device) for v in (self.shape.mean, self.shape.std)
        )
        pixels = (images.float() / 255.0 - mean) / std
        if masked is not None:
            hidden = masked.view(-1, self.side, self.side)
            hidden = hidden.repeat_interleave(self.patch_size, dim=1)
            hidden = hidden.repeat_interleave(self.patch_size, dim=2)
            pixels = pixels.masked_fill(hidden[..., None], 0.0)
        return pixels.permute(0, 3, 1, 2).contiguous()


class TextModel(Tower):
    """Tokens to one state per token."""

    def __init__(self, architecture: TowersArchitecture) -> None:
        super().__init__(architecture.text)

    def forward(
        self,
        tokens: Int64[Tensor, "batch length"],
        padding: Bool[Tensor, "batch length"],
    ) -> Float[Tensor, "batch length width"]:
        """Return the states; those of padding mean nothing."""
        # a softmax over nothing would be NaN: a row without text attends to its first padding
        first = torch.arange(tokens.shape[1], device=tokens.device) == 0
        visible = ~padding | first
        states: Tensor = self.model(
            input_ids=tokens, attention_mask=visible.long()
        ).last_hidden_state
        return states


class Bridge(nn.Module):
    """A tower's states to the fusion's width: LayerNorm, then a projection."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs)
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, states: Float[Tensor, "batch places inputs"]) -> Tensor:
        """Return (batch, places, outputs)."""
        result: Tensor = self.proj(self.norm(states))
        return result

    def reset_parameters(self) -> None:
        """Keep angles: the projection has orthonormal rows or columns."""
        nn.init.orthogonal_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)


class Towers(ContentEncoder):
    """Two towers and a multiway transformer over [CLS, patches, text tokens]."""

    architecture: TowersArchitecture

    def __init__(self, architecture: TowersArchitecture) -> None:
        super().__init__()
        width = architecture.width
        self.architecture = architecture
        self.vision_tower = VisionModel(architecture)
        self.text_tower = TextModel(architecture)
        self.vision_bridge = Bridge(architecture.vision.width, width)
        self.text_bridge = Bridge(architecture.text.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.cls_token = nn.Parameter(torch.zeros(1, width))
        self.encoder = MultiwayEncoder(
            width=width,
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
        own = self._look(images, masked_patches, tokens, text_padding)
        return self._fuse(own, has_image, text_padding, masked_patches, wanted)

    def feature_parts(self, pooling: Pooling) -> list[FeaturePart]:
        """Return what the columns of ``features`` describe: with "all" also the towers' own."""
        parts = super().feature_parts(pooling)
        if pooling == "all":
            parts.append(FeaturePart("image", self.architecture.vision.width))
            parts.append(FeaturePart("text", self.architecture.text.width))
        return parts

    def features(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        has_image: Bool[Tensor, " batch"],
        tokens: Int64[Tensor, "batch length"],
        text_padding: Bool[Tensor, "batch length"],
        *,
        pooling: Pooling,
    ) -> Float[Tensor, "batch dim"]:
        """See ``ContentEncoder``; "all" ends with the means of each tower's own states."""
        own = self._look(images, None, tokens, text_padding)
        streams = self._fuse(own, has_image, text_padding)
        fused = pool(streams, has_image, text_padding, pooling=pooling)
        if pooling != "all":
            return fused
        vision = own.vision.mean(dim=1) * has_image[:, None]
        return torch.cat([fused, vision, mean_of(own.text, ~text_padding)], dim=1)

    def _look(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        masked_patches: Bool[Tensor, "batch patches"] | None,
        tokens: Int64[Tensor, "batch length"],
        text_padding: Bool[Tensor, "batch length"],
    ) -> Streams:
        """Return the towers' own states."""
        return Streams(
            self.vision_tower(images, masked_patches, self.mask_token.dtype),
            self.text_tower(tokens, text_padding),
        )

    def _fuse(
        self,
        own: Streams,
        has_image: Bool[Tensor, " batch"],
        text_padding: Bool[Tensor, "batch length"],
        masked_patches: Bool[Tensor, "batch patches"] | None = None,
        wanted: Streams | None = None,
    ) -> Streams:
        """Return the states of the fusion transformer."""
        vision, text = self.vision_bridge(own.vision), self.text_bridge(own.text)
        absent = ~has_image[:, None].expand(-1, vision.shape[1])
        hidden = absent if masked_patches is None else absent | masked_patches
        cls_state = self.cls_token + mean_of(vision, ~hidden) + mean_of(text, ~text_padding)
        if masked_patches is not None:
            vision = torch.where(masked_patches[..., None], self.mask_token, vision)
        vision_padding = F.pad(absent, (1, 0), value=False)
        streams = Streams(torch.cat([cls_state[:, None], vision], dim=1), text)
        result: Streams = self.encoder(streams, vision_padding, text_padding, wanted)
        return result

    def reset_parameters(self) -> None:
        """Draw what is not of the towers from torch's default generator."""
        self.vision_bridge.reset_parameters()
        self.text_bridge.reset_parameters()
        self.encoder.reset_parameters()
        for name, parameter in self.encoder.layers.named_parameters():
            if ".out_proj." in name or ".fc2." in name:
                nn.init.zeros_(parameter)

    def frozen_state(self) -> dict[str, Tensor]:
        """Return the weights of frozen towers."""
        towers = {"vision_tower": self.vision_tower, "text_tower": self.text_tower}
        return {
            f"{name}.{key}": tensor
            for name, tower in towers.items()
            for key, tensor in tower.frozen_state().items()
        }

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Round the weights of frozen towers."""
        self.vision_tower.cast_frozen(dtype)
        self.text_tower.cast_frozen(dtype)


def resample(
    grid: Float[Tensor, "batch width rows columns"], side: int
) -> Float[Tensor, "batch width side side"]:
    """Bring a square grid of states to ``side`` x ``side``: means of a finer one, else linear.

    As a product with a constant matrix along each axis, because the backward passes of torch's
    pooling and interpolation add up in any order on a GPU.
    """
    before = grid.shape[-1]
    if before == side:
        return grid
    one = torch.eye(before, dtype=torch.float64, device=grid.device)[None]  # (1, before, before)
    if before > side:
        turn = F.adaptive_avg_pool1d(one, side)[0]
    else:
        turn = F.interpolate(one, size=side, mode="linear", align_corners=False)[0]
    turn = turn.to(grid.dtype)
    return torch.einsum("bwrc,rs,ct->bwst", grid, turn, turn)
