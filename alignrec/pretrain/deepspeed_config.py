"""The JSON that DeepSpeed is given, derived from the settings in one place, without "auto"."""

from typing import Any

from alignrec.errors import UserError
from alignrec.pretrain.config import PretrainConfig

BUCKET_SIZE = 5 * 10**8  # DeepSpeed's default: gradients that are summed over ranks at a time
# What can be offloaded -> the first ZeRO stage that takes it apart.
OFFLOAD_STAGES = {"none": 0, "optimizer": 1, "parameters": 3}
_NEVER = 10**9  # steps between DeepSpeed's own prints: telemetry reports instead


def deepspeed_settings(
    config: PretrainConfig, *, num_ranks: int, num_parameters: int = BUCKET_SIZE
) -> dict[str, Any]:
    """Return DeepSpeed's settings for this number of ranks and size of the model.

    The optimizer is not among them: it is torch's AdamW, handed to DeepSpeed as the client
    optimizer, because DeepSpeed's own CPU Adam is compiled when it is first used.

    Raises:
        UserError: the global batch is too small for the ranks, bf16 without ZeRO, or something
            offloaded that this ZeRO stage does not take apart.
    """
    _refuse_offload(config)
    if config.precision == "bf16" and config.zero_stage == 0:
        raise UserError(
            "pretrain.zero_stage=0 with pretrain.precision=bf16 would keep no fp32 copy of the "
            "parameters, so small updates would be lost. Set pretrain.zero_stage to 1, 2 or 3."
        )
    micro, accumulation = config.split_batch(num_ranks)
    settings: dict[str, Any] = {
        # its product is checked; a smaller global batch leaves some micro batches shorter
        "train_batch_size": micro * accumulation * num_ranks,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": accumulation,
        # ZeRO-0 clips without telling the norm, so the engine does it there
        "gradient_clipping": config.max_gradient_norm if config.zero_stage else 0.0,
        "zero_optimization": {
            "stage": config.zero_stage,
            # allocated whole, so for a small model the default would be 2 GB of nothing
            "reduce_bucket_size": min(num_parameters, BUCKET_SIZE),
            # every parameter is partitioned, however small: the memory is what was asked for
            "stage3_param_persistence_threshold": 0,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
        "wall_clock_breakdown": False,
    }
    if config.precision == "bf16":
        settings["bf16"] = {"enabled": True}
        # sums over micro batches and ranks in fp32, as in an fp32 run
        settings["data_types"] = {"grad_accum_dtype": "fp32"}
        settings["communication_data_type"] = "fp32"
    if config.offload != "none":
        settings["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        # torch's AdamW steps on the host; DeepSpeed's own would have to be compiled
        settings["zero_force_ds_cpu_optimizer"] = False
    if config.offload == "parameters":
        settings["zero_optimization"]["offload_param"] = {"device": "cpu"}
    return settings


def _refuse_offload(config: PretrainConfig) -> None:
    needed = OFFLOAD_STAGES[config.offload]
    if config.zero_stage < needed:
        raise UserError(
            f"pretrain.offload={config.offload} has no effect under pretrain.zero_stage="
            f"{config.zero_stage}, which keeps that whole on every rank. Set zero_stage to "
            f"{needed} or more, or offload to none."
        )
