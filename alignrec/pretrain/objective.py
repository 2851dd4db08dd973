"""Inter-content alignment (ICA): predict masked tokens and patches from what is left of both.

    L_ICA = mean over masked tokens of -log p(token | rest)
          + image_weight * mean over masked patches of mean((pixels - predicted pixels)^2)

Both means run over the whole global batch. A rank returns sums; the trainer divides them by the
global counts, so that ranks and micro batches of unequal size give the loss of one big batch.
"""

import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from alignrec.data.loader import ItemBatch
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.encoder import Encoder, patchify
from alignrec.pretrain.masking import Masks
from alignrec.pretrain.multiway import Streams

_TINY_VARIANCE = 1e-6


@dataclasses.dataclass(frozen=True)
class MaskedBatch:
    """A batch on the device.

    Attributes:
        item_index: (batch,) item_index, -1 in padding rows.
        images: (batch, size, size, 3) pixels.
        has_image: (batch,) whether there is a picture.
        targets: (batch, length) tokens before masking.
        tokens: (batch, length) tokens as shown to the encoder.
        text_padding: (batch, length) True where no token is.
        masked_text: (batch, length) True where the token is to be predicted.
        masked_patches: (batch, patches) True where the patch is to be predicted.
    """

    item_index: Int64[Tensor, " batch"]
    images: UInt8[Tensor, "batch size size 3"]
    has_image: Bool[Tensor, " batch"]
    targets: Int64[Tensor, "batch length"]
    tokens: Int64[Tensor, "batch length"]
    text_padding: Bool[Tensor, "batch length"]
    masked_text: Bool[Tensor, "batch length"]
    masked_patches: Bool[Tensor, "batch patches"]

    @classmethod
    def of(cls, batch: ItemBatch, masks: Masks) -> "MaskedBatch":
        """Join items and masks (on CPU)."""
        return cls(
            item_index=torch.from_numpy(batch.item_index),
            images=torch.from_numpy(batch.images),
            has_image=torch.from_numpy(batch.has_image),
            targets=torch.from_numpy(batch.tokens),
            tokens=torch.from_numpy(masks.tokens),
            text_padding=torch.from_numpy(batch.text_padding),
            masked_text=torch.from_numpy(masks.text),
            masked_patches=torch.from_numpy(masks.patches),
        )

    def to(self, device: torch.device) -> "MaskedBatch":
        """Return the batch on a device."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return MaskedBatch(**{name: t.to(device, non_blocking=True) for name, t in fields.items()})

    def counts(self) -> Float[Tensor, "2"]:
        """Return the numbers of masked tokens and masked patches."""
        return torch.stack([self.masked_text.sum(), self.masked_patches.sum()]).double()


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What is predicted at the masked positions of a batch, in row-major order of the masks.

    Attributes:
        logits: (masked tokens, vocabulary).
        patches: (masked patches, values), in the space of ``patch_targets``.
    """

    logits: Float[Tensor, "tokens vocabulary"]
    patches: Float[Tensor, "patches values"]


class MaskedModel(nn.Module):
    """Encoder with the two prediction heads."""

    def __init__(
        self, architecture: Architecture, *, predict_from_cls: bool, normalise_patches: bool
    ) -> None:
        super().__init__()
        width = architecture.width
        self.normalise_patches = normalise_patches
        self.encoder = Encoder(architecture)
        self.mlm_head = nn.Linear(width, architecture.vocabulary_size)
        self.mim_head = nn.Linear(width, architecture.patch_values)
        self.cls_to_text = nn.Linear(width, width) if predict_from_cls else None
        self.cls_to_vision = nn.Linear(width, width) if predict_from_cls else None

    def reset_parameters(self) -> None:
        """Draw all parameters from torch's default generator."""
        self.encoder.reset_parameters()
        for head in (self.mlm_head, self.mim_head):
            nn.init.normal_(head.weight, std=head.in_features**-0.5)
            nn.init.zeros_(head.bias)

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Tensor, Predictions]:
        """Return loss sums over masked tokens and over masked patches, and the predictions."""
        streams = self.encoder(
            batch.images, batch.has_image, batch.tokens, batch.text_padding, batch.masked_patches
        )
        predictions = self._predict(streams, batch)
        words = F.cross_entropy(
            predictions.logits, batch.targets[batch.masked_text], reduction="sum"
        )
        pixels = F.mse_loss(predictions.patches, self.patch_targets(batch), reduction="none")
        return words, pixels.mean(dim=1).sum(), predictions

    def patch_targets(self, batch: MaskedBatch) -> Float[Tensor, "patches values"]:
        """Return the pixels to predict, -1 .. 1 or normalised per patch."""
        patches = patchify(batch.images, self.encoder.architecture.patch_size)
        pixels = patches[batch.masked_patches]
        if not self.normalise_patches:
            return pixels
        variance, mean = torch.var_mean(pixels, dim=1, keepdim=True)
        return (pixels - mean) / (variance + _TINY_VARIANCE).sqrt()

    def _predict(self, streams: Streams, batch: MaskedBatch) -> Predictions:
        summary = streams.vision[:, 0]
        text, vision = streams.text, streams.vision[:, 1:]
        if self.cls_to_text is not None and self.cls_to_vision is not None:
            text = text + self.cls_to_text(summary)[:, None]
            vision = vision + self.cls_to_vision(summary)[:, None]
        return Predictions(
            self.mlm_head(text[batch.masked_text]).float(),
            self.mim_head(vision[batch.masked_patches]).float(),
        )


def build_model(
    architecture: Architecture, *, predict_from_cls: bool, normalise_patches: bool, seed: int
) -> MaskedModel:
    """Return a model whose parameters are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedModel(
            architecture, predict_from_cls=predict_from_cls, normalise_patches=normalise_patches
        )
        model.reset_parameters()
    return model
