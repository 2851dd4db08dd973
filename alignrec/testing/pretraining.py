"""Tiny pretraining runs for tests: an encoder of two layers, and runs that vanish at a step."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

from alignrec.pretrain import STAGE, training
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.masking import MaskSettings
from alignrec.stage import Context

TINY_ENCODER = {
    "num_layers": 2,
    "width": 16,
    "num_heads": 2,
    "hidden": 24,
    "image_size": 16,
    "patch_size": 4,
}

# of pictures of TINY_ENCODER and of texts of 50 words
TINY_MASKS = MaskSettings(
    seed=1,
    patch_ratio=0.4,
    paired_text_ratio=0.5,
    alone_text_ratio=0.15,
    patches_per_side=4,
    mask_id=4,
    special_ids=(0, 1, 2),
    vocabulary_size=50,
)


class _VanishedError(Exception):
    pass


def context_of(config: PretrainConfig, dataset: Path, output: Path) -> Context:
    """Return the context that the command line would make."""
    inputs = {"dataset": dataset}
    return Context(
        inputs=inputs,
        output=output,
        fingerprint=STAGE.fingerprint(config, inputs),
        log_dir=output.with_name(output.name + ".logs"),
    )


def run_until(config: PretrainConfig, dataset: Path, output: Path, *, step: int) -> None:
    """Run the stage on this rank, but vanish right after a step, as after a SIGKILL."""
    original = training.Trainer.one_step

    def one_step(self: training.Trainer, batches: Any) -> dict[str, float]:  # noqa: ANN401
        if self.step == step:
            raise _VanishedError
        return original(self, batches)

    with (
        mock.patch.object(training.Trainer, "one_step", one_step),
        contextlib.suppress(_VanishedError),
    ):
        training.run(config, context_of(config, dataset, output))
