"""DeepSpeed around the model, and its state without its pickles (objective -> training).

The trainer sees one interface for every ZeRO stage: forward and backward of a micro batch, a step,
and full fp32 tensors by parameter name for checkpoints, so that a run can go on with another number
of ranks or another stage.
"""

import contextlib
import datetime
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn

from alignrec.distributed.process_group import Rank, rank_from_environment
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.deepspeed_config import deepspeed_settings
from alignrec.pretrain.objective import MaskedBatch, MaskedModel, Predictions
from alignrec.pretrain.optimizer import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"  # key of the moving average of the weights, beside Adam's moments
_AVERAGE_START = 10.0


class Engine:
    """A model under DeepSpeed with torch's AdamW."""

    def __init__(
        self,
        model: MaskedModel,
        config: PretrainConfig,
        rank: Rank,
        *,
        beat: Beat = unwatched,
    ) -> None:
        """Set DeepSpeed up; collective.

        Args:
            model: on the CPU: under ZeRO-3 no device ever holds all of it.
            config: of the stage.
            rank: this rank.
            beat: is called for each part between two collectives, as often on every rank.
        """
        deepspeed = _import_deepspeed()
        settings = deepspeed_settings(
            config,
            num_ranks=rank.world_size,
            num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        )
        self._rank, self._num_ranks, self._device = rank.index, rank.world_size, rank.device
        self._gradient_scale = rank.world_size * settings["gradient_accumulation_steps"]
        self._optimizer = torch.optim.AdamW(
            parameter_groups(
                model,
                config.weight_decay,
                layer_decay=config.layer_decay,
                tower_rate=config.encoder.tower_rate,
            ),
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            fused=True,  # one pass over memory instead of a dozen
        )
        if config.precision == "bf16":  # DeepSpeed casts parameters alone
            model.encoder.cast_frozen(torch.bfloat16)
        self._zero_stage, self._max_norm = config.zero_stage, config.max_gradient_norm
        self._norm: Tensor | None = None  # of the last step's gradient under ZeRO-0
        self._ema_decay = config.ema_decay
        self._beat = beat
        self._beat_along(model)
        self._kept_keys = MOMENTS if config.ema_decay is None else (*MOMENTS, AVERAGE)
        if config.zero_stage == 3:
            _divide(model, settings, rank.device)
        self._engine, *_ = deepspeed.initialize(
            model=model, optimizer=self._optimizer, config=settings, dist_init_required=False
        )
        if self._num_ranks == 1 and config.zero_stage == 0:
            # nobody to sum with: DeepSpeed would still copy all gradients into one buffer and back
            self._engine.enable_backward_allreduce = False
        self._link_optimizer_state()

    @property
    def model(self) -> MaskedModel:
        """The wrapped model; under ZeRO-3 its parameters are empty outside of forward."""
        module: MaskedModel = self._engine.module
        return module

    @property
    def gradient_norm(self) -> Float[Tensor, ""]:
        """Norm of the last step's gradient before it was clipped, alike on all ranks.

        Where it is not finite, ZeRO 1-3 have left the step out without a word, and under ZeRO-0 the
        parameters are spoilt.
        """
        norm = self._norm if self._zero_stage == 0 else self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, device=self._device).reshape(())

    def forward(self, batch: MaskedBatch) -> tuple[Tensor, Predictions]:
        """Return the model's loss sums and predictions."""
        result: tuple[Tensor, Predictions] = self._engine(batch)
        self._beat()
        return result

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of ``loss``, this rank's addend of the global loss.

        DeepSpeed averages over ranks and micro steps; the scale makes that the sum.
        """
        self._engine.backward(loss * self._gradient_scale)

    def step(self, learning_rate: float) -> None:
        """End a micro step; at the last one of a step the parameters move."""
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate * group["rate_share"]
        if self._zero_stage == 0 and self._engine.is_gradient_accumulation_boundary():
            self._norm = nn.utils.clip_grad_norm_(
                self.model.parameters(), self._max_norm or math.inf
            )
        self._engine.step()

    def average(self, step: int) -> None:
        """Move the average of the weights after optimizer step ``step``, every rank its share.

        The decay rises as (1 + step) / (10 + step) at first, so that the random start is forgotten.
        """
        if self._ema_decay is None:
            return
        decay = min(self._ema_decay, (1.0 + step) / (_AVERAGE_START + step))
        for parameter, state in self._optimizer.state.items():
            state[AVERAGE].lerp_(parameter.detach(), 1.0 - decay)

    def use_average(self) -> None:
        """Replace the weights by their average, where one is kept; every rank calls it."""
        if self._ema_decay is None:
            return
        import deepspeed

        for _, parameter in self.model.named_parameters():
            value = self._optimizer_state(parameter, AVERAGE)
            if not self._keeps_own_state(parameter):
                self._set_full(parameter, value)
            partitioned = [parameter] if hasattr(parameter, "ds_id") else []
            with deepspeed.zero.GatheredParameters(partitioned, modifier_rank=0):
                parameter.data.copy_(value)

    def parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, full fp32 value) of every parameter; every rank must exhaust it alike."""
        from deepspeed.utils import safe_get_full_fp32_param

        for name, parameter in self.model.named_parameters():
            value = safe_get_full_fp32_param(parameter)
            yield name, (parameter if value is None else value).detach()

    def state(self) -> Iterator[tuple[str, Tensor]]:
        """Yield parameters and, as "name/exp_avg", optimizer state; all full and in fp32."""
        yield from self.parameters()
        for name, parameter in self.model.named_parameters():
            for key in self._kept_keys:
                yield f"{name}/{key}", self._optimizer_state(parameter, key)

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take over what ``state`` gave after ``step`` optimizer steps, under any ranks and stage.

        The model must have been built with the same parameters: DeepSpeed copies those at
        initialisation, and here only its fp32 masters and the moments are set.
        """
        for name, parameter in self.model.named_parameters():
            if self._keeps_own_state(parameter):
                own = self._optimizer.state[parameter]
                for key in self._kept_keys:
                    own[key].copy_(state[f"{name}/{key}"])
                continue
            self._set_full(parameter, state[name])
            for key in self._kept_keys:
                self._set_full(parameter, state[f"{name}/{key}"], key)
        for own in self._optimizer.state.values():
            own["step"].fill_(float(step))

    def _optimizer_state(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return a parameter's full state; every rank must ask for it alike."""
        from deepspeed.utils import safe_get_full_optimizer_state

        if self._keeps_own_state(parameter):
            own: Tensor = self._optimizer.state[parameter][key]
            return own
        full: Tensor = safe_get_full_optimizer_state(parameter, key)
        return full

    def _set_full(self, parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Set a parameter's fp32 master, or what the optimizer keeps of it as ``key``.

        Under ZeRO-3 the rank's share is cut here: DeepSpeed's functions for full tensors fail where
        the last rank's share is padded, because the size is no multiple of the number of ranks
        (deepspeed 0.19.8, zero/stage3.py, set_full_hp_param).
        """
        from deepspeed import utils

        if hasattr(parameter, "ds_id"):
            share = int(parameter.ds_tensor.numel())  # type: ignore[attr-defined]
            padded = nn.functional.pad(
                value.flatten(), (0, share * self._num_ranks - value.numel())
            )
            value = padded[self._rank * share : (self._rank + 1) * share]
            if key is None:
                utils.safe_set_local_fp32_param(parameter, value)
            else:
                utils.safe_set_local_optimizer_state(parameter, value, key)
        elif key is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, key)

    def _keeps_own_state(self, parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed leaves this parameter to the optimizer as it is (ZeRO-0 in fp32)."""
        return not hasattr(parameter, "ds_id") and not hasattr(parameter, "_hp_mapping")

    def _beat_along(self, model: MaskedModel) -> None:
        """Beat between the collectives of DeepSpeed, which a rank that hangs does not reach.

        Hooks run in the order in which they are made: these before DeepSpeed's own, so that who
        waits for the peers there has one beat more than who hangs before it.
        """
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda _: self._beat()
            )
        self._optimizer.register_step_post_hook(lambda *_: self._beat())
        if self._zero_stage == 3:  # it gathers the parameters of each module
            for module in model.modules():
                module.register_forward_hook(lambda *_: self._beat())

    def _link_optimizer_state(self) -> None:
        """Create AdamW's state, and the weights' average, now and tell DeepSpeed where they lie.

        DeepSpeed's stages 1 and 2 look for it after the first parameter group's first step, when
        the second group has none yet, so ``safe_get_full_optimizer_state`` fails for that group
        (deepspeed 0.19.8, zero/stage_1_and_2.py, _lazy_init_hp_params_optimizer_state).
        """
        groups = self._optimizer.param_groups
        # ZeRO-3 puts its flat partitions into the groups only for the length of a step
        partitions = getattr(self._engine.optimizer, "fp32_partitioned_groups_flat", None)
        for parameter in partitions or [p for group in groups for p in group["params"]]:
            state = self._optimizer.state[parameter]
            if not state:
                state["step"] = torch.tensor(0.0, device=parameter.device)
                state |= {moment: torch.zeros_like(parameter) for moment in MOMENTS}
                if self._ema_decay is not None:
                    state[AVERAGE] = parameter.detach().clone()
        for parameter in self.model.parameters():
            mapping = getattr(parameter, "_hp_mapping", None)
            if mapping is not None:
                flat = groups[mapping.param_group_index]["params"][0]
                mapping.set_optim_state_fragment(flat, self._optimizer.state[flat])


@contextlib.contextmanager
def deepspeed_group() -> Iterator[None]:
    """Have a process group even for one rank, and keep torch's notes to DeepSpeed from the user."""
    device = rank_from_environment().device
    owner = not dist.is_initialized()
    if owner:
        # DeepSpeed sums gradients over one rank, too: on a GPU they must not leave it for that
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=dist.HashStore(),  # type: ignore[attr-defined]
            rank=0,
            world_size=1,
            timeout=datetime.timedelta(seconds=60),
        )
    try:
        with _local_rank_of(device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`torch\.distributed.*is deprecated", FutureWarning)
            yield
    finally:
        _forget_groups()
        if owner:
            dist.destroy_process_group()


def _divide(model: MaskedModel, settings: dict[str, Any], device: torch.device) -> None:
    """Divide the parameters over the ranks for ZeRO-3, one after another; collective.

    DeepSpeed would do it itself, but move the whole model to the device first.
    """
    import deepspeed

    dtype = torch.bfloat16 if "bf16" in settings else torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    offloaded = "offload_param" in settings["zero_optimization"]
    deepspeed.zero.Init(
        module=model,
        config_dict_or_path=settings,
        remote_device="cpu" if offloaded else None,
        dtype=dtype,
    )


@contextlib.contextmanager
def _local_rank_of(device: torch.device) -> Iterator[None]:
    """Have DeepSpeed take this device: it goes by LOCAL_RANK, whatever GPUs a rank is shown."""
    before = os.environ.get("LOCAL_RANK")
    os.environ["LOCAL_RANK"] = str(device.index or 0)
    try:
        yield
    finally:
        if before is None:
            del os.environ["LOCAL_RANK"]
        else:
            os.environ["LOCAL_RANK"] = before


def _forget_groups() -> None:
    """Let DeepSpeed find the process group afresh when the same process trains again.

    It keeps the groups of the first training in module globals (deepspeed 0.19.8, comm/comm.py and
    utils/groups.py) and has no public call that drops them without destroying the group itself.
    """
    if "deepspeed" not in sys.modules:
        return
    import deepspeed.comm.comm as deepspeed_comm
    from deepspeed.utils import groups

    groups._release_process_group_references(group=None)
    deepspeed_comm.cdb = None


def _import_deepspeed() -> Any:  # noqa: ANN401 - a module without types
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    import deepspeed
    from deepspeed.ops import __compatible_ops__
    from deepspeed.runtime import bf16_optimizer

    # it prints a dozen lines of memory where bf16 meets ZeRO-1, whatever the settings say
    # (deepspeed 0.19.8, runtime/bf16_optimizer.py)
    bf16_optimizer.see_memory_usage = lambda *_, **__: None
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory all-reduce for CPU ranks of one host on first use
    # (40 s, needs a compiler); its segments outlive a SIGKILL and its waiting ranks spin.
    __compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
