"""Inter-content alignment (ICA): predict masked tokens and patches from what is left of both.

    L_ICA = mean over masked tokens of -log p(token | rest)
          + image_weight * mean over masked patches of the loss of the picture target

which is mean((pixels - predicted pixels)^2), or -log p(code | rest) (``targets.py``). Both means
run over the whole global batch. A rank returns sums; the trainer divides them by the global counts,
so that ranks and micro batches of unequal size give the loss of one big batch.

In BEiT-3 nothing pulls on the CLS state, though AlignRec takes it for the item's feature. So CLS
alone has to tell, too, which words the text has, and the masked patches by their positions (an idea
of RetroMAE, Xiao et al. 2022). ``summary_weight: 0`` is BEiT-3's objective.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from alignrec.data.loader import ItemBatch
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.config import ObjectiveConfig
from alignrec.pretrain.encoder import make_encoder
from alignrec.pretrain.linear import Linear
from alignrec.pretrain.masking import Masks
from alignrec.pretrain.multiway import SMALL_STD, Streams
from alignrec.pretrain.targets import PictureTarget, pixel_target

# Means over masked tokens, masked patches, all tokens and masked patches of the global batch.
LOSSES = ("text", "image", "summary_text", "summary_image")


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
        text_places: where ``masked_text`` is True, in the flattened mask; found on the host,
            because one would have to wait for a GPU to know how many they are.
        patch_places: where ``masked_patches`` is True, likewise.
    """

    item_index: Int64[Tensor, " batch"]
    images: UInt8[Tensor, "batch size size 3"]
    has_image: Bool[Tensor, " batch"]
    targets: Int64[Tensor, "batch length"]
    tokens: Int64[Tensor, "batch length"]
    text_padding: Bool[Tensor, "batch length"]
    masked_text: Bool[Tensor, "batch length"]
    masked_patches: Bool[Tensor, "batch patches"]
    text_places: Int64[Tensor, " masked_tokens"]
    patch_places: Int64[Tensor, " masked_patches"]

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
            text_places=torch.from_numpy(np.flatnonzero(masks.text)),
            patch_places=torch.from_numpy(np.flatnonzero(masks.patches)),
        )

    def to(self, device: torch.device) -> "MaskedBatch":
        """Return the batch on a device; a copy from pinned memory goes on while others compute."""
        return self._mapped(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> "MaskedBatch":
        """Return the batch in memory that a GPU reads by itself."""
        return self._mapped(Tensor.pin_memory)

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> "MaskedBatch":
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return MaskedBatch(**{name: change(tensor) for name, tensor in fields.items()})

    @property
    def words(self) -> Int64[Tensor, " masked_tokens"]:
        """The tokens to predict."""
        return self.targets.flatten()[self.text_places]

    def counts(self) -> Float[Tensor, "4"]:
        """Return over how many positions each of ``LOSSES`` is a sum; best asked on the host."""
        words, patches = len(self.text_places), len(self.patch_places)
        tokens = int((~self.text_padding).sum())
        counts = [words, patches, tokens, patches]
        return torch.tensor(counts, dtype=torch.float64, device=self.text_places.device)


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What is predicted at the masked positions of a batch, in row-major order of the masks.

    Attributes:
        logits: (masked tokens, vocabulary).
        patches: (masked patches, head size of the picture target).
        patch_goals: (masked patches, ...), what the picture target wants of them.
    """

    logits: Float[Tensor, "tokens vocabulary"]
    patches: Float[Tensor, "patches head"]
    patch_goals: Tensor


class Summary(nn.Module):
    """Vectors for the two heads, made from the CLS state alone.

    The words are told by the state itself but for a linear map that starts as the identity: what
    the catalogue's words teach then lies in CLS, the feature, and not in layers thrown away.
    """

    def __init__(self, width: int, num_patches: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.text = Linear(width, width)
        self.vision = Linear(width, width)
        self.positions = nn.Embedding(num_patches, width)

    def forward(
        self, cls_state: Float[Tensor, "batch width"], places: Int64[Tensor, " masked_patches"]
    ) -> tuple[Tensor, Tensor]:
        """Return one vector per item for its words, and one per masked patch (flat places)."""
        state = self.norm(cls_state)
        num_patches = self.positions.num_embeddings
        vision = self.vision(state)[places // num_patches] + self.positions(places % num_patches)
        return self.text(state), F.gelu(vision)

    def reset_parameters(self) -> None:
        """Start with the identity for the words."""
        nn.init.eye_(self.text.weight)
        nn.init.zeros_(self.text.bias)


class MaskedModel(nn.Module):
    """Encoder with the two prediction heads and, where asked for, the summary.

    The picture target is no part of the module: what it computes goals with is not trained, so
    DeepSpeed must not divide it over ranks, nor a checkpoint hold it.
    """

    def __init__(
        self,
        architecture: Architecture,
        objective: ObjectiveConfig,
        target: PictureTarget | None = None,
    ) -> None:
        """Make the layers; without a target the pixels are predicted."""
        super().__init__()
        width = architecture.width
        self.target = target or pixel_target(architecture, normalise=objective.normalise_patches)
        self.encoder = make_encoder(architecture)
        self.mlm_head = Linear(width, architecture.vocabulary_size)
        self.mim_head = Linear(width, self.target.head_size)
        self.summary = (
            Summary(width, architecture.num_patches) if objective.summary_weight else None
        )

    def reset_parameters(self) -> None:
        """Draw all parameters from torch's default generator."""
        self.encoder.reset_parameters()
        for head in (self.mlm_head, self.mim_head):
            nn.init.normal_(head.weight, std=SMALL_STD)
            nn.init.zeros_(head.bias)
        if self.summary is not None:
            self.summary.reset_parameters()

    def forward(self, batch: MaskedBatch) -> tuple[Float[Tensor, "4"], Predictions]:
        """Return the four loss sums of ``LOSSES`` and the predictions."""
        with_cls = F.pad(batch.masked_patches, (1, 0), value=self.summary is not None)
        streams = self.encoder(
            batch.images,
            batch.has_image,
            batch.tokens,
            batch.text_padding,
            batch.masked_patches,
            Streams(with_cls, batch.masked_text),  # the heads read nothing else
        )
        predictions = Predictions(
            self.mlm_head(streams.text.flatten(0, 1)[batch.text_places]).float(),
            self.mim_head(streams.vision.flatten(0, 1)[self._behind_cls(batch)]).float(),
            self.target.goals(batch.images, batch.patch_places),
        )
        goals = predictions.patch_goals
        sums = [
            F.cross_entropy(predictions.logits, batch.words, reduction="sum"),
            self.target.loss(predictions.patches, goals),
        ]
        if self.summary is None:
            sums += [torch.zeros_like(sums[0])] * 2
        else:
            for_text, for_patches = self.summary(streams.vision[:, 0], batch.patch_places)
            log_shares = self.mlm_head(for_text).float().log_softmax(dim=1)  # (batch, vocabulary)
            told = log_shares.gather(1, batch.targets)  # (batch, length)
            sums += [
                -told.masked_fill(batch.text_padding, 0.0).sum(),
                self.target.loss(self.mim_head(for_patches).float(), goals),
            ]
        return torch.stack(sums), predictions

    def _behind_cls(self, batch: MaskedBatch) -> Int64[Tensor, " masked_patches"]:
        """Return where masked patches lie among vision states: before each item's is its CLS."""
        places = batch.patch_places
        return places + places // batch.masked_patches.shape[1] + 1


def build_model(
    architecture: Architecture,
    objective: ObjectiveConfig,
    *,
    seed: int,
    target: PictureTarget | None = None,
) -> MaskedModel:
    """Return a model whose parameters are a function of the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedModel(architecture, objective, target)
        model.reset_parameters()
    return model


def loss_weights(objective: ObjectiveConfig) -> Float[Tensor, "4"]:
    """Return the weight of each of ``LOSSES``."""
    image, summary = objective.image_weight, objective.summary_weight
    return torch.tensor([1.0, image, summary, summary * image])
