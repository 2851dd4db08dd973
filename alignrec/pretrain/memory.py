"""How much memory a rank needs, from the settings alone (configuration -> plan).

Bytes of tensors, with P parameters, n ranks, a = 4 (fp32) or 2 (bf16) bytes a number, T = micro
batch x (1 + patches + text tokens), d = width, h = hidden, V = vocabulary:

    parameters   a P             under ZeRO-3 a P / n, and with n > 1 up to a P that are gathered
                 for use and up to a P (5e7 numbers at most) on their way
    master       4 P / n         fp32 copy of ZeRO 1-3; none under ZeRO-0
    moments      8 P / n         Adam's two, and 4 P / n for the average; under ZeRO-0 not divided
    offload      (4 + a) P / n   gradients and parameters on their way, on the host; ZeRO-3 4 P / n
    activations  a T (9 d + 3 h) for each layer, or a T d for each and this once when recomputed;
                 what the heads keep: about 2 x 4 V a masked token, 5 x 4 values a masked patch,
                 or 4 x 4 codes; while goals are computed, what that takes instead;
                 what towers that are trained keep is counted in a forward pass without numbers
    targets      the codebook or the tokenizer that codes come from, on every rank

and of gradients, B = 4 P or less (the bucket, 2 GB, of what is summed over ranks at a time):

    ZeRO     always       beside activations            while a bucket is summed
    0                     4 P if accumulated            4 P + B (one rank: 4 P)
    1, fp32               B, and 4 P if accumulated     4 P + B
    1, bf16  4 P          2 P if accumulated            2 P + B
    2, fp32               B, and 4 P / n if accum.      2 B, and 4 P / n if accumulated
    2, bf16               B / 2, and 4 P / n if accum.  2 B + 4 P / n
    3        4 P / n + B  what is gathered              2 B

With offload ZeRO-1 in bf16 is as ZeRO-2, but that 4 P are accumulated and 2 P wait. The peak is
when one of the last two is largest; where a bucket holds a part of P alone, it is first summed with
the activations of the other part still there. AdamW is fused and needs nothing. Measured on CPU
ranks; NCCL needs B less under ZeRO-3. Not counted: Python, torch and DeepSpeed themselves (about
0.4 GB of host memory a rank, on a GPU its context), what an allocator leaves unused between
tensors, and prefetched batches.
"""

import dataclasses
import math

from alignrec.pretrain.architecture import Architecture, TowersArchitecture
from alignrec.pretrain.config import ObjectiveConfig, PretrainConfig
from alignrec.pretrain.deepspeed_config import BUCKET_SIZE

_FP32 = 4
_MAX_GATHERED = 10**9  # DeepSpeed's stage3_max_live_parameters
_MAX_FETCHED = 5 * 10**7  # and stage3_prefetch_bucket_size


@dataclasses.dataclass(frozen=True)
class TargetSize:
    """What the picture target adds.

    Attributes:
        head_size: numbers that the picture head gives for a patch.
        is_codes: whether these are logits of codes, not pixels.
        frozen_bytes: of what goals are computed with.
        working_bytes: of computing the goals of a micro batch.
    """

    head_size: int
    is_codes: bool = False
    frozen_bytes: int = 0
    working_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of a rank's tensors by what they are for.

    Attributes:
        parameters: that forward and backward use.
        master: fp32 copies that the optimizer moves.
        moments: Adam's, and the average of the weights.
        offload: gradients and parameters on their way to and from the host.
        activations: what the forward pass leaves for the backward pass, at most.
        gradients: at most, copies that are being summed over ranks included.
        targets: of what the goals of masked patches are computed with.
        host: of these, bytes that ``offload`` keeps in the host's memory.
        peak: largest sum at any moment, the host's share included.
    """

    parameters: int
    master: int
    moments: int
    offload: int
    activations: int
    gradients: int
    targets: int
    host: int
    peak: int


@dataclasses.dataclass(frozen=True)
class _Gradients:
    """Bytes of gradients: always there, beside all activations, and while they are summed."""

    always: int
    beside: int
    summed: int


def memory_per_rank(
    config: PretrainConfig,
    architecture: Architecture,
    *,
    num_parameters: int,
    largest: int,
    num_ranks: int,
    num_frozen: int = 0,
    target: TargetSize | None = None,
) -> Memory:
    """Return what ``config.zero_stage`` needs.

    Args:
        config: settings.
        architecture: resolved shapes; texts are taken to be as long as it allows.
        num_parameters: of the model with its heads.
        largest: numbers in the largest parameter.
        num_ranks: ranks that share the work.
        num_frozen: numbers in frozen towers, which every rank holds whole.
        target: of the picture head; without one, pixels.
    """
    micro, _ = config.split_batch(num_ranks)
    wide, is_divided = _wide(config), config.zero_stage > 0
    share = -(-num_parameters // num_ranks)
    moments = _FP32 * (share if is_divided else num_parameters)
    moments *= 2 if config.ema_decay is None else 3
    master = _FP32 * share if is_divided else 0
    held = wide * (share if config.zero_stage == 3 else num_parameters)
    gathered = _gathered(config, num_parameters, num_ranks=num_ranks)
    sent, on_host = _offloaded(config, share, held=held, state=master + moments)
    staged = 2 * wide * largest if sent and config.zero_stage < 3 else 0
    target = target or TargetSize(architecture.patch_values)
    activations = activation_bytes(config, architecture, target, micro_batch_size=micro)
    gradients = _gradients(config, num_parameters, num_ranks=num_ranks)
    # under ZeRO 2-3 a first bucket is full when the backward pass has this share before it
    left = 1 - min(num_parameters, BUCKET_SIZE) / num_parameters if config.zero_stage > 1 else 0.0
    # what the end of the backward pass reads stays gathered: embeddings
    last = 2 * wide * largest if gathered else 0
    parts = {
        "parameters": wide * num_frozen + held + gathered,
        "master": master,
        "moments": moments,
        "offload": sent + staged,
        "targets": target.frozen_bytes,
    }
    return Memory(
        **parts,
        activations=activations,
        gradients=gradients.always + max(gradients.beside, gradients.summed),
        host=on_host,
        peak=sum(parts.values())
        - gathered
        + gradients.always
        + max(
            gradients.beside + gathered + activations,
            gradients.summed + last + round(left * (gathered + activations)),
        ),
    )


def _gathered(config: PretrainConfig, num_parameters: int, *, num_ranks: int) -> int:
    """Return what ZeRO-3 gathers for use, at most."""
    if config.zero_stage < 3 or num_ranks == 1:
        return 0
    fetched = min(num_parameters, _MAX_FETCHED)
    return _wide(config) * (min(num_parameters, _MAX_GATHERED) + fetched)


def _offloaded(config: PretrainConfig, share: int, *, held: int, state: int) -> tuple[int, int]:
    """Return what offloading adds on the host, and all that lies there."""
    if config.offload == "none":
        return 0, 0
    sent = share * (_FP32 + (_wide(config) if config.zero_stage < 3 else 0))
    return sent, state + sent + (held if config.offload == "parameters" else 0)


def _wide(config: PretrainConfig) -> int:
    """Return the bytes of a number in forward and backward."""
    return 2 if config.precision == "bf16" else _FP32


def _gradients(config: PretrainConfig, num_parameters: int, *, num_ranks: int) -> _Gradients:
    """Return the table at the top of this module, as it applies."""
    stage, wide = config.zero_stage, _wide(config)
    whole, share = _FP32 * num_parameters, _FP32 * -(-num_parameters // num_ranks)
    bucket = min(num_parameters, BUCKET_SIZE)
    summed = _FP32 * bucket
    accumulated = config.split_batch(num_ranks)[1] > 1
    if stage == 0:
        return _Gradients(0, whole * accumulated, whole + (summed if num_ranks > 1 else 0))
    if stage == 3:
        return _Gradients(share + summed, 0, 2 * summed)
    if wide == _FP32 and stage == 1:
        return _Gradients(0, summed + whole * accumulated, summed + whole)
    if wide == _FP32:
        kept = share if accumulated or bucket < num_parameters else 0
        return _Gradients(0, summed + share * accumulated, 2 * summed + kept)
    own = wide * num_parameters
    if stage == 1 and config.offload == "none":  # DeepSpeed's BF16_Optimizer
        return _Gradients(whole, own * accumulated, own + summed)
    kept = whole if stage == 1 and accumulated else share
    waiting = own if stage == 1 else wide * bucket
    return _Gradients(
        0, wide * bucket + kept * accumulated, wide * bucket + waiting + summed + kept
    )


def activation_bytes(
    config: PretrainConfig,
    architecture: Architecture,
    target: TargetSize,
    *,
    micro_batch_size: int,
) -> int:
    """Return what one forward pass leaves for the backward pass."""
    wide = _wide(config)
    positions = 1 + architecture.num_patches + architecture.max_text_tokens
    tokens = micro_batch_size * positions
    states = wide * tokens * architecture.width
    layer = wide * tokens * (9 * architecture.width + 3 * architecture.hidden)
    below = micro_batch_size * _input_bytes(architecture, wide)
    heads = micro_batch_size * _head_bytes(config.objective, architecture, target, wide)
    heads = max(heads, target.working_bytes)
    if config.activation_checkpointing:
        # the heads' share is gone before the last layer is computed again
        above = architecture.num_layers * states + max(layer, heads)
    else:
        above = architecture.num_layers * layer + heads
    return above + 4 * states + below


def _input_bytes(architecture: Architecture, wide: int) -> int:
    """Return what is kept of one item below the multiway transformer: its pixels, or by towers."""
    if not isinstance(architecture, TowersArchitecture):
        return _FP32 * architecture.num_patches * architecture.patch_values
    from alignrec.pretrain.tower_memory import saved_numbers  # torch and transformers take seconds

    return wide * saved_numbers(architecture)


def _head_bytes(
    objective: ObjectiveConfig, architecture: Architecture, target: TargetSize, wide: int
) -> int:
    """Return what the heads keep of one item: logits, their log-softmax, predictions, errors."""
    words = math.ceil(objective.paired_text_ratio * (architecture.max_text_tokens - 2))
    patches = round(objective.patch_ratio * architecture.num_patches)
    summaries = 1 if objective.summary_weight else 0
    narrow = wide if wide < _FP32 else 0  # bf16 logits beside their fp32 copy
    logits = (2 * _FP32 + narrow) * architecture.vocabulary_size * (words + summaries)
    if target.is_codes:
        picture = (2 * _FP32 + narrow) * target.head_size * patches * (1 + summaries)
    else:
        picture = _FP32 * target.head_size * patches * (3 + 2 * summaries)
    return logits + picture
