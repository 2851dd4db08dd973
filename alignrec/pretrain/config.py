"""Settings of stage 1: encoder, objective, tokenizer, optimisation, DeepSpeed and loading."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

from alignrec import configuration
from alignrec.configuration import option, watchdog_option
from alignrec.data.config import ShardsConfig
from alignrec.errors import UserError
from alignrec.pretrain.architecture import Architecture, TowersArchitecture

SIZES = {
    # name: layers, width, heads, hidden
    "tiny": (4, 128, 4, 512),
    "small": (12, 384, 6, 1536),
    "base": (12, 768, 12, 3072),
    "large": (24, 1024, 16, 4096),
}
# A fusion over towers: its layers, and the width of one of its attention heads.
TOWER_LAYERS, TOWER_HEAD = 2, 64


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """Shape of the multiway transformer, and the towers below it where there are any."""

    kind: Literal["multiway", "towers"] = option(
        "multiway",
        "multiway: BEiT-3's transformer from the pixels and tokens up; towers: a transformer over "
        "the states of a vision and a text model of transformers",
    )
    vision: str | None = option(
        None, "towers: folder or hub id of a transformers vision model (safetensors)"
    )
    text: str | None = option(
        None, "towers: folder or hub id of a transformers text model (safetensors)"
    )
    frozen: tuple[Literal["vision", "text"], ...] = option(
        (), "towers whose weights stay as they are: less time and memory"
    )
    tower_rate: float = option(
        1.0, "learning rate of the towers, as a share of the fusion's", minimum=0, maximum=1
    )
    size: Literal["tiny", "small", "base", "large"] = option(
        "tiny", "preset of layers / width / heads / hidden; base and large are BEiT-3's"
    )
    num_layers: int | None = option(
        None, "transformer layers, instead of the preset's (towers: 2)", minimum=1
    )
    width: int | None = option(
        None, "hidden state size, instead of the preset's (towers: the text tower's)", minimum=8
    )
    num_heads: int | None = option(
        None,
        "attention heads, instead of the preset's (towers: one for 64 of the width)",
        minimum=1,
    )
    hidden: int | None = option(
        None, "feed-forward size, instead of the preset's (towers: 4 x the width)", minimum=8
    )
    image_size: int = option(64, "side of the square picture in pixels", minimum=8)
    patch_size: int = option(16, "side of a patch in pixels", minimum=2)
    max_text_tokens: int = option(
        128, "longest text in tokens, the two at its ends included", minimum=4, maximum=1022
    )

    def __post_init__(self) -> None:
        """Refuse settings of the other kind.

        Raises:
            UserError: towers without models, or settings that have no effect on this kind.
        """
        if self.kind == "towers":
            absent = [name for name in ("vision", "text") if getattr(self, name) is None]
            if absent:
                raise UserError(
                    f"pretrain.encoder.kind=towers needs pretrain.encoder.{absent[0]}: a folder or "
                    f"hub id of a transformers {absent[0]} model. Set it."
                )
            idle = ["size"] if self.size != EncoderConfig.size else []
            if {"vision", "text"} <= set(self.frozen) and self.tower_rate != 1.0:
                raise UserError(
                    f"pretrain.encoder.tower_rate={self.tower_rate} has no effect, because "
                    f"pretrain.encoder.frozen names both towers. Leave one of the two out."
                )
        else:
            names = ("vision", "text", "frozen", "tower_rate")
            idle = [name for name in names if getattr(self, name) != getattr(EncoderConfig, name)]
        if idle:
            raise UserError(
                f"pretrain.encoder.{idle[0]} has no effect on pretrain.encoder.kind={self.kind}. "
                f"Leave one of the two out."
            )

    @property
    def num_patches(self) -> int:
        """Patches of a picture."""
        return (self.image_size // self.patch_size) ** 2

    def architecture(self, vocabulary_size: int) -> Architecture:
        """Return the resolved shapes.

        Raises:
            UserError: sizes that do not divide each other, or a tower that cannot be read.
        """
        if self.image_size % self.patch_size:
            raise UserError(
                f"pretrain.encoder: image_size={self.image_size} is no multiple of "
                f"patch_size={self.patch_size}, so pixels would be left over. Change one of them."
            )
        return (
            self._towers(vocabulary_size)
            if self.kind == "towers"
            else self._shapes(vocabulary_size, *SIZES[self.size])
        )

    def _shapes(
        self, vocabulary_size: int, layers: int, width: int, heads: int, hidden: int
    ) -> Architecture:
        """Return the shapes, the given ones being for what is not set."""
        width = self.width or width
        heads = self.num_heads or heads
        if width % heads:
            raise UserError(
                f"pretrain.encoder: width={width} cannot be split over num_heads={heads}. "
                f"Choose a width that is a multiple of the number of heads."
            )
        return Architecture(
            num_layers=self.num_layers or layers,
            width=width,
            num_heads=heads,
            hidden=self.hidden or hidden,
            image_size=self.image_size,
            patch_size=self.patch_size,
            vocabulary_size=vocabulary_size,
            max_text_tokens=self.max_text_tokens,
        )

    def _towers(self, vocabulary_size: int) -> TowersArchitecture:
        from alignrec.pretrain.tower_models import text_tower, vision_tower  # these load torch

        assert self.vision is not None
        assert self.text is not None
        vision = vision_tower(
            self.vision, image_size=self.image_size, frozen="vision" in self.frozen
        )
        text = text_tower(
            self.text,
            vocabulary_size=vocabulary_size,
            max_tokens=self.max_text_tokens,
            frozen="text" in self.frozen,
        )
        width = self.width or text.width
        fusion = self._shapes(
            vocabulary_size, TOWER_LAYERS, width, max(width // TOWER_HEAD, 1), 4 * width
        )
        shapes = dataclasses.asdict(fusion) | {"num_text_positions": self.max_text_tokens + 2}
        return TowersArchitecture(**shapes, vision=vision, text=text)


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    """What is masked and what is predicted."""

    targets: Literal["pixels", "codebook", "vqkd"] = option(
        "pixels",
        "what a masked patch is predicted as: its pixels, a code of visual words learned on the "
        "catalogue, or a code of BEiT v2's tokenizer",
    )
    num_codes: int = option(
        8192, "codebook: codes, at most one for 32 patches that it is learned on", minimum=2
    )
    codebook_pictures: int = option(
        10_000, "codebook: pictures that it is learned on, at most", minimum=1
    )
    vqkd: Path | None = option(
        None, "vqkd: BEiT v2's tokenizer, vqkd_encoder_base_decoder_*.pth or .safetensors"
    )
    patch_ratio: float = option(
        0.4, "share of patches masked, block-wise", minimum=0.0, maximum=0.95
    )
    paired_text_ratio: float = option(
        0.5, "share of tokens masked in items with a picture", minimum=0.0, maximum=0.95
    )
    alone_text_ratio: float = option(
        0.15, "share of tokens masked in items without a picture", minimum=0.0, maximum=0.95
    )
    normalise_patches: bool = option(
        False, "predict each patch's pixels less its mean, over its deviation (as MAE does)"
    )
    image_weight: float = option(0.3, "weight of the picture loss beside the text loss", minimum=0)
    summary_weight: float = option(
        1.0,
        "weight of telling the words and the masked patches from the CLS state alone, which makes "
        "CLS a summary of the item; 0: BEiT-3's objective",
        minimum=0,
    )

    def __post_init__(self) -> None:
        """Refuse settings of another target.

        Raises:
            UserError: a setting that has no effect on these targets, no tokenizer for vqkd, or
                nothing to predict.
        """
        owners = {
            "normalise_patches": "pixels",
            "num_codes": "codebook",
            "codebook_pictures": "codebook",
            "vqkd": "vqkd",
        }
        for name, owner in owners.items():
            value = getattr(self, name)
            if owner != self.targets and value != getattr(ObjectiveConfig, name):
                raise UserError(
                    f"pretrain.objective.{name}={value} has no effect on pretrain.objective."
                    f"targets={self.targets}. Leave it out, or set targets to {owner}."
                )
        texts = self.paired_text_ratio or self.alone_text_ratio
        if not (self.summary_weight or texts or self.patch_ratio * self.image_weight):
            raise UserError(
                "pretrain.objective masks no tokens and no patches that count, and has no summary, "
                "so the loss would be 0 and nothing be learned. Set paired_text_ratio, "
                "alone_text_ratio, patch_ratio with image_weight, or summary_weight above 0."
            )
        if self.targets == "vqkd" and self.vqkd is None:
            raise UserError(
                "pretrain.objective.targets=vqkd needs BEiT v2's tokenizer. Set pretrain.objective."
                "vqkd to a vqkd_encoder_base_decoder_*.pth."
            )


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """Where the tokenizer comes from."""

    path: str | None = option(
        None,
        "a tokenizer.json, a sentencepiece model (beit3.spm), or a folder or hub id of a "
        "transformers tokenizer; without one it is trained on the catalogue's text, and towers "
        "take their text model's",
    )
    vocabulary_size: int = option(
        4096, "tokens of a trained tokenizer, at most (a smaller catalogue has fewer)", minimum=300
    )
    initial_vectors: Literal["texts", "random"] = option(
        "texts",
        "token embeddings and the text head start from which tokens share texts, or at random; "
        "those of initial.checkpoint and of a text tower go before both",
    )

    def __post_init__(self) -> None:
        """Refuse a setting that another one makes idle.

        Raises:
            UserError: a size for a tokenizer that is not trained.
        """
        if self.path is not None and self.vocabulary_size != TokenizerConfig.vocabulary_size:
            raise UserError(
                f"pretrain.tokenizer.vocabulary_size={self.vocabulary_size} has no effect on "
                f"{self.path}, which is not trained here. Leave one of the two out."
            )


@dataclasses.dataclass(frozen=True)
class InitialConfig:
    """Weights to start from instead of random ones."""

    checkpoint: Path | None = option(
        None,
        "BEiT-3's .pth or .safetensors, or the folder of an encoder trained here; needs "
        "tokenizer.path, because token embeddings mean nothing with other tokens",
    )
    heads: Literal["load", "fresh"] = option(
        "load", "take the prediction heads that fit from the checkpoint, or draw them anew"
    )

    def __post_init__(self) -> None:
        """Refuse a setting that another one makes idle.

        Raises:
            UserError: heads of no checkpoint.
        """
        if self.checkpoint is None and self.heads != "load":
            raise UserError(
                f"pretrain.initial.heads={self.heads} has no effect without initial.checkpoint. "
                f"Leave it out or name a checkpoint."
            )


@dataclasses.dataclass(frozen=True)
class LoaderConfig:
    """How samples are read."""

    num_threads: int = option(
        1, "threads a rank decodes with", minimum=1, maximum=64, affects_result=False
    )
    prefetch: int = option(
        4, "micro batches a rank prepares ahead", minimum=0, maximum=1024, affects_result=False
    )
    block_size: int = option(256, "neighbouring samples that are shuffled as one block", minimum=1)
    window_size: int = option(65_536, "samples that are shuffled among each other", minimum=1)
    shards: ShardsConfig = option(
        ShardsConfig(), "where the shards are, if not in the dataset", affects_result=False
    )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """Stage 1: mask-then-predict over (picture, text) pairs.

    The number of ranks, the micro batch and the ZeRO stage change only the order of float
    summation, because masks, crops and batches are functions of (seed, epoch, item) and every loss
    is averaged over the global batch; so they do not make a finished encoder stale.
    """

    num_ranks: int = option(1, "processes that train together", minimum=1, affects_result=False)
    seed: int = option(0, "of weights, order, crops and masks", minimum=0)
    encoder: EncoderConfig = option(EncoderConfig(), "shape of the encoder")
    objective: ObjectiveConfig = option(ObjectiveConfig(), "what is masked and predicted")
    tokenizer: TokenizerConfig = option(TokenizerConfig(), "where the tokenizer comes from")
    initial: InitialConfig = option(InitialConfig(), "weights to start from")
    loader: LoaderConfig = option(LoaderConfig(), "how samples are read")
    epochs: int = option(10, "passes over the items", minimum=1)
    max_steps: int | None = option(
        None, "optimizer steps after which to stop, even within the epochs", minimum=1
    )
    valid_fraction: float = option(
        0.05, "share of items kept out of training to judge predictions", minimum=0, maximum=0.5
    )
    global_batch_size: int = option(64, "items in one optimizer step, over all ranks", minimum=1)
    micro_batch_size: int | None = option(
        None,
        "items of one rank in one forward pass, at most; without one, a rank's whole share when "
        "the run first started",
        minimum=1,
        affects_result=False,
    )
    learning_rate: float = option(1e-3, "peak learning rate", minimum=0)
    warmup_fraction: float = option(
        0.1, "share of the steps over which the rate rises from 0", minimum=0, maximum=1
    )
    final_rate_fraction: float = option(
        0.05, "the cosine ends at this share of the peak rate", minimum=0, maximum=1
    )
    layer_decay: float = option(
        1.0,
        "factor from a layer's learning rate to that of the layer below, down to the embeddings; "
        "less than 1 keeps what given weights have learned",
        minimum=0.01,
        maximum=1,
    )
    ema_decay: float | None = option(
        None,
        "the encoder is an exponential moving average of the weights with this decay a step "
        "(slower at the start); without one, the last weights",
        minimum=0,
        maximum=0.99999,
    )
    weight_decay: float = option(0.05, "AdamW's, on matrices only", minimum=0)
    beta1: float = option(0.9, "AdamW's first moment decay", minimum=0, maximum=0.9999)
    beta2: float = option(0.98, "AdamW's second moment decay", minimum=0, maximum=0.99999)
    max_gradient_norm: float = option(
        3.0, "gradients are clipped to this norm; 0: never", minimum=0
    )
    zero_stage: Literal[0, 1, 2, 3] = option(
        2, "what DeepSpeed ZeRO partitions over ranks", affects_result=False
    )
    offload: Literal["none", "optimizer", "parameters"] = option(
        "none",
        "keep the optimizer's state (ZeRO 1-3), or the parameters as well (ZeRO-3), in the host's "
        "memory: for models that a GPU cannot hold",
        affects_result=False,
    )
    precision: Literal["fp32", "bf16"] = option("fp32", "number format of forward and backward")
    activation_checkpointing: bool = option(
        False,
        "compute each layer again in the backward pass instead of keeping what is inside it",
        affects_result=False,
    )
    compile: bool = option(
        False,
        "compile the layers with torch.compile, where a compiler works",
        affects_result=False,
    )
    checkpoint_steps: int = option(
        200, "optimizer steps between checkpoints", minimum=1, affects_result=False
    )
    keep_checkpoints: int = option(
        2, "newest checkpoints that stay on disk", minimum=1, affects_result=False
    )
    log_steps: int = option(10, "optimizer steps between log rows", minimum=1, affects_result=False)
    timeout_seconds: float = option(
        300.0,
        "how long a rank waits for a silent peer; more than rank 0 takes for what it prepares "
        "alone: tokenizer, codebook, download and projections of towers",
        minimum=1,
        affects_result=False,
    )
    watchdog_seconds: float | None = watchdog_option()

    def __post_init__(self) -> None:
        """Refuse settings that contradict each other, and take the text tower's tokenizer.

        Raises:
            UserError: given token embeddings for a tokenizer that is trained here, or so few
                patches that none would be masked.
        """
        self._refuse_few_patches()
        if self.encoder.kind == "towers":
            self._take_tower_tokenizer()
        if self.initial.checkpoint is not None and self.tokenizer.path is None:
            raise UserError(
                f"pretrain.initial.checkpoint={self.initial.checkpoint} holds embeddings of its "
                f"own tokens, but the tokenizer would be trained on the catalogue. Set "
                f"pretrain.tokenizer.path to the checkpoint's tokenizer (beit3.spm for BEiT-3)."
            )

    def _refuse_few_patches(self) -> None:
        count, ratio = self.encoder.num_patches, self.objective.patch_ratio
        if ratio and round(ratio * count) == 0:
            raise UserError(
                f"pretrain.objective.patch_ratio={ratio} of the {count} patches of a picture "
                f"(image_size={self.encoder.image_size}, patch_size={self.encoder.patch_size}) is "
                f"none, so no patch would ever be predicted. Lower pretrain.encoder.patch_size, "
                f"raise patch_ratio, or set it to 0."
            )

    def _take_tower_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        if tokenizer.path is None:
            given = dataclasses.replace(tokenizer, path=self.encoder.text)
            object.__setattr__(self, "tokenizer", given)

    def source_identity(self) -> str:
        """Return a digest of what is given: tokenizers, checkpoint and towers."""
        given = [
            self.tokenizer.path,
            self.initial.checkpoint,
            self.encoder.vision,
            self.encoder.text,
            self.objective.vqkd,
        ]
        return configuration.digest([_content(Path(path)) for path in given if path is not None])

    def split_batch(self, num_ranks: int) -> tuple[int, int]:
        """Return (micro batch size, accumulation) for this number of ranks.

        As few passes as ``micro_batch_size`` allows, as even as they can be. Where the global batch
        is not their product with the ranks, the last ones are shorter, or empty on some ranks.

        Raises:
            UserError: more ranks, or a larger micro batch, than the global batch has items.
        """
        size, most = self.global_batch_size, self.micro_batch_size or self.global_batch_size
        if num_ranks > size or most > size:
            fault = f"{num_ranks} ranks" if num_ranks > size else f"micro_batch_size={most}"
            raise UserError(
                f"pretrain.global_batch_size={size} is less than {fault}, so some ranks would "
                f"have nothing to do. Raise it, or lower num_ranks or micro_batch_size to at most "
                f"{size}."
            )
        share = -(-size // num_ranks)
        accumulation = -(-share // most)
        return -(-share // accumulation), accumulation


def _content(path: Path) -> dict[str, str]:
    """Return the SHA-256 of a file, or of every file in a folder; empty for a hub id."""
    files = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.is_file())
    result = {}
    for file in files:
        with file.open("rb") as stream:
            result[file.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return result
