"""Tiny encoders for tests: of two layers, never trained, or by runs that vanish at a step."""

import contextlib
from pathlib import Path
from typing import Any
from unittest import mock

from alignrec import artifacts, configuration
from alignrec.pretrain import STAGE, training
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.encoder import save_encoder
from alignrec.pretrain.masking import MaskSettings
from alignrec.pretrain.objective import build_model
from alignrec.pretrain.tokenizer import TOKENIZER, load_words, write_tokenizer
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


def write_encoder(folder: Path, dataset: Path) -> Path:
    """Write the artifact of a TINY_ENCODER that was never trained; returns the folder."""
    section = {
        "encoder": {**TINY_ENCODER, "max_text_tokens": 20},
        "tokenizer": {"vocabulary_size": 320},
    }
    config = configuration.build(PretrainConfig, section, section="pretrain")
    inputs = {"dataset": dataset}
    mark = STAGE.fingerprint(config, inputs)
    with artifacts.writing(
        folder, kind="encoder", fingerprint=mark, config=section, inputs=inputs
    ) as draft:
        write_tokenizer(dataset, config, draft.path / TOKENIZER)
        words = load_words(draft.path / TOKENIZER, max_length=20)
        architecture = config.encoder.architecture(words.vocabulary_size)
        encoder = build_model(architecture, config.objective, seed=0).encoder
        save_encoder(architecture, draft.path, encoder.state_dict())
    return folder


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
