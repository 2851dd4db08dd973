"""What masked patches are predicted as: pixels, or codes of visual words (objective).

A target says how wide the picture head is, what it should say, how wrong it is, and how well a
constant answer would do.
"""

import abc
import dataclasses

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own spelling
from jaxtyping import Bool, Float, Float64, Int64, UInt8
from torch import Tensor

from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.clustering import SCORES_AT_ONCE
from alignrec.pretrain.codebook import Codebook
from alignrec.pretrain.encoder import cut_patches, patchify
from alignrec.pretrain.vqkd import VqkdTokenizer

_TINY_VARIANCE = 1e-6


class PictureTarget(abc.ABC):
    """What the picture head learns.

    Goals and predictions belong to the masked patches of a batch, in row-major order of the mask.

    Attributes:
        head_size: numbers that the head gives for a patch.
    """

    head_size: int

    @property
    def frozen_bytes(self) -> int:
        """Bytes of what the goals are computed with."""
        return 0

    @property
    def facts(self) -> dict[str, float]:
        """What was measured when the target was made."""
        return {}

    def working_bytes(self, *, num_pictures: int, num_masked: int) -> int:  # noqa: ARG002
        """Return how much memory goals take while they are computed.

        Args:
            num_pictures: of a micro batch.
            num_masked: masked patches in them.
        """
        return 0

    @abc.abstractmethod
    def goals(
        self, images: UInt8[Tensor, "batch size size 3"], places: Int64[Tensor, " patches"]
    ) -> Tensor:
        """Return what the head should say of each masked patch: (patches, ...).

        Args:
            images: pixels.
            places: of the masked patches among all patches of the batch, ascending.
        """

    @abc.abstractmethod
    def loss(self, predicted: Float[Tensor, "patches head"], goals: Tensor) -> Float[Tensor, ""]:
        """Return the sum of the losses of the patches."""

    @abc.abstractmethod
    def tally(
        self, predicted: Float[Tensor, "patches head"], goals: Tensor
    ) -> Float64[Tensor, " numbers"]:
        """Return numbers that ``summary`` needs the sums of, over batches and ranks."""

    @abc.abstractmethod
    def summary(
        self, tally: Float64[Tensor, " numbers"], *, loss: float, num_patches: float
    ) -> dict[str, float]:
        """Return how good predictions are beside a constant answer.

        Args:
            tally: sum of tallies.
            loss: sum of losses.
            num_patches: patches that both are sums over, at least one.
        """

    @abc.abstractmethod
    def pixels(
        self, predicted: Float[Tensor, "patches head"], true: Float[Tensor, "patches values"]
    ) -> Float[Tensor, "patches values"] | None:
        """Return predicted pixels -1 .. 1, the true ones being at hand; None without any."""

    def best_pixels(self, goals: Tensor) -> Float[Tensor, "patches values"] | None:  # noqa: ARG002
        """Return the pixels of a perfect prediction; None where they are the true ones or none."""
        return None

    def hits(
        self,
        predicted: Float[Tensor, "patches head"],  # noqa: ARG002
        goals: Tensor,  # noqa: ARG002
    ) -> Bool[Tensor, " patches"] | None:
        """Return which predictions are right; None where there is no right and wrong."""
        return None


@dataclasses.dataclass(frozen=True)
class PixelTarget(PictureTarget):
    """The pixels of a patch, by squared error.

    Attributes:
        patch_size: side of a patch in pixels.
        head_size: numbers in a patch.
        normalise: less their mean, over their deviation (as in MAE, He et al. 2022).
    """

    patch_size: int
    head_size: int
    normalise: bool

    def goals(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        places: Int64[Tensor, " patches"],
    ) -> Float[Tensor, "patches values"]:
        """Return the pixels to predict, -1 .. 1 or normalised per patch."""
        pixels = patchify(images, self.patch_size).flatten(0, 1)[places]
        if not self.normalise:
            return pixels
        mean, deviation = _moments(pixels)
        return (pixels - mean) / deviation

    def loss(
        self, predicted: Float[Tensor, "patches head"], goals: Float[Tensor, "patches head"]
    ) -> Float[Tensor, ""]:
        """Return the sum over patches of the mean squared error of a patch."""
        return (predicted - goals).square().mean(dim=1).sum()

    def tally(
        self,
        predicted: Float[Tensor, "patches head"],  # noqa: ARG002 - the loss tells all
        goals: Float[Tensor, "patches head"],
    ) -> Float64[Tensor, " numbers"]:
        """Return the sum of squares and the sum of patches."""
        exact = goals.double()
        squares = exact.square().mean(dim=1).sum()
        return torch.cat([squares[None], exact.sum(dim=0)])

    def summary(
        self, tally: Float64[Tensor, " numbers"], *, loss: float, num_patches: float
    ) -> dict[str, float]:
        """Return the squared error and that of the mean patch."""
        mean_square = float((tally[1:] / num_patches).square().mean())
        return {
            "image_loss": loss / num_patches,
            "image_loss_mean_patch": float(tally[0]) / num_patches - mean_square,
        }

    def pixels(
        self, predicted: Float[Tensor, "patches head"], true: Float[Tensor, "patches values"]
    ) -> Float[Tensor, "patches values"]:
        """Return the predictions, normalised ones with mean and deviation of the true patch."""
        if not self.normalise:
            return predicted
        mean, deviation = _moments(true)
        return predicted * deviation + mean


class _Codes(PictureTarget):
    """Codes of patches, by cross-entropy."""

    def __init__(self, num_codes: int) -> None:
        self.head_size = num_codes

    def loss(
        self, predicted: Float[Tensor, "patches codes"], goals: Int64[Tensor, " patches"]
    ) -> Float[Tensor, ""]:
        """Return the sum over patches of -log p(code)."""
        return F.cross_entropy(predicted, goals, reduction="sum")

    def tally(
        self, predicted: Float[Tensor, "patches codes"], goals: Int64[Tensor, " patches"]
    ) -> Float64[Tensor, " numbers"]:
        """Return how many codes are right, and how often each occurs."""
        right = self.hits(predicted, goals).sum()
        counts = torch.bincount(goals, minlength=self.head_size)
        return torch.cat([right[None], counts]).double()

    def hits(
        self, predicted: Float[Tensor, "patches codes"], goals: Int64[Tensor, " patches"]
    ) -> Bool[Tensor, " patches"]:
        """Return where the most likely code is the right one."""
        return predicted.argmax(dim=1) == goals

    def summary(
        self, tally: Float64[Tensor, " numbers"], *, loss: float, num_patches: float
    ) -> dict[str, float]:
        """Return loss and accuracy beside those of a constant answer."""
        return {
            "image_loss": loss / num_patches,
            "image_accuracy": float(tally[0]) / num_patches,
            **self.constant(tally[1:] / num_patches),
        }

    @abc.abstractmethod
    def constant(self, shares: Float64[Tensor, " codes"]) -> dict[str, float]:
        """Return how well a constant answer does where codes have these shares."""


class CodebookTarget(_Codes):
    """Codes of a codebook that was learned on the catalogue."""

    def __init__(self, codebook: Codebook, patch_size: int) -> None:
        super().__init__(codebook.num_codes)
        self.codebook = codebook
        self.patch_size = patch_size

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the codebook."""
        book = self.codebook
        features = (book.features.basis, book.features.offset)
        return sum(t.nbytes for t in (*features, book.centers, book.mean_patches, book.counts))

    @property
    def facts(self) -> dict[str, float]:
        """How well the codes describe the patches that they were learned on."""
        return self.codebook.facts

    def goals(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        places: Int64[Tensor, " patches"],
    ) -> Int64[Tensor, " patches"]:
        """Return the codes of the masked patches."""
        return self.codebook.codes(cut_patches(images, self.patch_size).flatten(0, 1)[places])

    def constant(self, shares: Float64[Tensor, " codes"]) -> dict[str, float]:
        """Return the loss of the training sample's shares, the accuracy of its commonest code.

        So nothing is learned from the patches that are judged: with few of them their own entropy
        is far below what any constant from training can reach. One more patch of each code
        (Laplace), as a held-out code may be rare.
        """
        counts = self.codebook.counts.to(shares) + 1
        return {
            "image_loss_unigram": float(-(shares * (counts / counts.sum()).log()).sum()),
            "image_accuracy_unigram": float(shares[counts.argmax()]),
        }

    def pixels(
        self,
        predicted: Float[Tensor, "patches codes"],
        true: Float[Tensor, "patches values"],  # noqa: ARG002
    ) -> Float[Tensor, "patches values"]:
        """Return the mean patch of each predicted code."""
        return self.best_pixels(predicted.argmax(dim=1))

    def best_pixels(self, goals: Int64[Tensor, " patches"]) -> Float[Tensor, "patches values"]:
        """Return the mean patch of each code."""
        return self.codebook.mean_patches[goals].float() / 127.5 - 1.0

    def working_bytes(self, *, num_pictures: int, num_masked: int) -> int:  # noqa: ARG002
        """Return the bytes of the scores that are looked at together, and of exact pixels."""
        scores = min(SCORES_AT_ONCE, num_masked * self.head_size)
        pixels = num_masked * self.codebook.mean_patches.shape[1]
        basis = self.codebook.features.basis
        return scores * self.codebook.centers.itemsize + pixels * basis.itemsize


class VqkdTarget(_Codes):
    """Codes of BEiT v2's tokenizer."""

    def __init__(self, tokenizer: VqkdTokenizer) -> None:
        super().__init__(tokenizer.num_codes)
        self.tokenizer = tokenizer

    @property
    def frozen_bytes(self) -> int:
        """Bytes of the tokenizer's weights."""
        return sum(parameter.nbytes for parameter in self.tokenizer.parameters())

    def goals(
        self,
        images: UInt8[Tensor, "batch size size 3"],
        places: Int64[Tensor, " patches"],
    ) -> Int64[Tensor, " patches"]:
        """Return the codes of the masked patches; pictures without any are not looked at."""
        num_patches = self.tokenizer.patches_per_side**2
        item = places // num_patches
        wanted = torch.zeros(len(images), dtype=torch.bool, device=images.device)
        wanted[item] = True
        row = wanted.cumsum(dim=0) - 1  # among the wanted
        return self.tokenizer.codes(images[wanted])[row[item], places % num_patches]

    def constant(self, shares: Float64[Tensor, " codes"]) -> dict[str, float]:
        """Return the codes' entropy and the share of the most frequent one.

        That is the best constant for these very patches, as there is no sample of training: a
        lower bound, which no constant from training reaches.
        """
        seen = shares[shares > 0]
        return {
            "image_loss_entropy": float(-(seen * seen.log()).sum()),
            "image_accuracy_most_frequent": float(seen.max()),
        }

    def pixels(
        self, predicted: Float[Tensor, "patches codes"], true: Float[Tensor, "patches values"]
    ) -> None:
        """Return None: a code stands for a meaning, not for pixels."""

    def working_bytes(self, *, num_pictures: int, num_masked: int) -> int:  # noqa: ARG002
        """Return the bytes of one layer's states, or of the scores of all codes."""
        return self.tokenizer.working_bytes(num_pictures)


def pixel_target(architecture: Architecture, *, normalise: bool) -> PixelTarget:
    """Return the target of these shapes."""
    return PixelTarget(architecture.patch_size, architecture.patch_values, normalise)


def _moments(pixels: Float[Tensor, "patches values"]) -> tuple[Tensor, Tensor]:
    # not torch.var_mean, which warns where no patch is masked
    mean = pixels.mean(dim=1, keepdim=True)
    variance = (pixels - mean).square().sum(dim=1, keepdim=True) / (pixels.shape[1] - 1)
    return mean, (variance + _TINY_VARIANCE).sqrt()
