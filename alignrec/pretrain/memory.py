"""How much memory a rank needs, from the settings alone (configuration -> plan).

Bytes of tensors, with P parameters, n ranks, a = 4 (fp32) or 2 (bf16) bytes a number, T = micro
batch x (1 + patches + text tokens), d = width, h = hidden, V = vocabulary:

    parameters   a P             under ZeRO-3 a P / n, and up to 2 a P being gathered for use
    master       4 P / n         fp32 copy of ZeRO 1-3; none under ZeRO-0
    moments      8 P / n         Adam's two, and 4 P / n for the average; under ZeRO-0 not divided
    gradients    4 P             under ZeRO 2-3 4 P / n
    bucket       4 P             gradients being summed over ranks (at most 2 GB)
    activations  a T (9 d + 3 h) for each layer, or a T d for each and this once when recomputed;
                 what the heads keep: about 2 x 4 V a masked token, 5 x 4 values a masked patch,
                 or 4 x 4 codes; while goals are computed, what that takes instead;
                 what towers that are trained keep is counted in a forward pass without numbers
    targets      the codebook or the tokenizer that codes come from, on every rank
    step         12 P / n        temporaries of clipping and AdamW; under ZeRO-0 of one tensor

The peak is in the backward pass, where activations and buckets meet, or in the step. Not counted:
Python, torch and DeepSpeed themselves (about 0.4 GB of host memory a rank, on a GPU its context),
what an allocator leaves unused between tensors, and prefetched batches.
"""

import dataclasses
import math

from alignrec.pretrain.architecture import Architecture, TowersArchitecture
from alignrec.pretrain.config import ObjectiveConfig, PretrainConfig
from alignrec.pretrain.deepspeed_config import BUCKET_SIZE

_FP32 = 4
_MAX_GATHERED = 10**9  # DeepSpeed's stage3_max_live_parameters


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
        gradients: when all are there.
        bucket: gradients on their way between ranks.
        activations: what the forward pass leaves for the backward pass, at most.
        step: temporaries of the optimizer.
        targets: of what the goals of masked patches are computed with.
        host: of these, bytes that ``offload`` keeps in the host's memory.
        peak: largest sum at any moment, the host's share included.
    """

    parameters: int
    master: int
    moments: int
    gradients: int
    bucket: int
    activations: int
    step: int
    targets: int
    host: int
    peak: int


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
    stage = config.zero_stage
    micro, accumulation = config.split_batch(num_ranks)
    share = -(-num_parameters // num_ranks)
    divided = share if stage else num_parameters
    wide = 2 if config.precision == "bf16" else _FP32
    moments = divided * _FP32 * (2 if config.ema_decay is None else 3)
    master = divided * _FP32 if stage else 0
    gathered = 2 * min(num_parameters, _MAX_GATHERED) if num_ranks > 1 else 0
    parameters = wide * (num_frozen + (share + gathered if stage == 3 else num_parameters))
    gradients = _FP32 * (share if stage >= 2 else num_parameters)
    bucket = _FP32 * min(num_parameters, BUCKET_SIZE)
    target = target or TargetSize(architecture.patch_values)
    activations = activation_bytes(config, architecture, target, micro_batch_size=micro)
    step = 3 * _FP32 * share if stage else 2 * _FP32 * largest
    # stages 1 and 3 keep their gradient buffers from step to step, the others let them go
    kept = gradients if accumulation > 1 or stage in (1, 3) else 0
    fixed = parameters + master + moments + target.frozen_bytes
    # a collective may hold its bucket until the next one, so it counts at any moment
    in_backward, in_optimizer = kept + activations, gradients + step
    host = 0
    if config.offload != "none":
        host = master + moments + (wide * share if config.offload == "parameters" else 0)
    return Memory(
        parameters=parameters,
        master=master,
        moments=moments,
        gradients=gradients,
        bucket=bucket,
        activations=activations,
        step=step,
        targets=target.frozen_bytes,
        host=host,
        peak=fixed + bucket + max(in_backward, in_optimizer),
    )


def activation_bytes(
    config: PretrainConfig,
    architecture: Architecture,
    target: TargetSize,
    *,
    micro_batch_size: int,
) -> int:
    """Return what one forward pass leaves for the backward pass, and the last one's predictions."""
    wide = 2 if config.precision == "bf16" else _FP32
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
    # the predictions of the micro batch before are let go only when the next ones are there
    before = _FP32 * (words * architecture.vocabulary_size + patches * target.head_size)
    return logits + picture + before
