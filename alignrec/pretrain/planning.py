"""``python -m alignrec.pretrain plan``: what a run will need and do, without training.

Checks the configuration against a dataset and prints parameters, memory per rank by ZeRO stage,
steps, samples and tokens.
"""

import argparse
import dataclasses
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from alignrec import artifacts, configuration, stage
from alignrec.data.config import ShardsConfig
from alignrec.data.shards import SampleTable, open_shards
from alignrec.pretrain import STAGE
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.config import EncoderConfig, PretrainConfig
from alignrec.pretrain.data import check_room, describe_batch, make_plan, split_rows
from alignrec.pretrain.deepspeed_config import OFFLOAD_STAGES, deepspeed_settings
from alignrec.pretrain.given_tokenizer import read_given
from alignrec.pretrain.initial import TOKEN_EMBEDDINGS, fit, read_tensors, rename
from alignrec.pretrain.memory import Memory, TargetSize, memory_per_rank
from alignrec.pretrain.objective import MaskedModel
from alignrec.pretrain.target_files import planned_target
from alignrec.pretrain.targets import PictureTarget
from alignrec.pretrain.tokenizer import Words, as_words, read_texts, train
from alignrec.pretrain.tower_models import Modality, read_weights

ZERO_STAGES: tuple[Literal[0, 1, 2, 3], ...] = (0, 1, 2, 3)
_MAX_TEXTS = 5_000  # more would not change the mean length of a text
_MEBIBYTE = 2**20


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run will need and do.

    Attributes:
        num_ranks: ranks that train together.
        num_parameters: of the encoder with its heads.
        num_encoder_parameters: of the encoder alone.
        num_items: to train on, in an epoch.
        num_held_out: kept out to judge predictions.
        micro_batch_size: items of a rank in one forward pass.
        accumulation: forward passes of a rank in one step.
        batch: how a global batch is split, in words.
        steps_per_epoch: optimizer steps.
        num_steps: of the whole run.
        text_tokens_per_epoch: from the mean length of ``num_texts_read`` texts.
        patches_per_epoch: positions of pictures, absent ones included.
        num_texts_read: texts that were tokenised for the estimate.
        memory: ZeRO stage -> bytes of a rank.
    """

    num_ranks: int
    num_parameters: int
    num_encoder_parameters: int
    num_items: int
    num_held_out: int
    micro_batch_size: int
    accumulation: int
    batch: str
    steps_per_epoch: int
    num_steps: int
    text_tokens_per_epoch: int
    patches_per_epoch: int
    num_texts_read: int
    memory: dict[int, Memory]


def main(arguments: Sequence[str]) -> int:
    """Print the plan of a run; the exit code is that of ``alignrec.stage.main``."""
    parser = argparse.ArgumentParser(
        prog="python -m alignrec.pretrain plan",
        description="Check a pretraining run and tell what it needs, without training.",
    )
    parser.add_argument("--dataset", type=Path, required=True, help="folder of the dataset")
    parser.add_argument("--recipe", type=Path, help="YAML file; its section pretrain is used")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    options = parser.parse_args(arguments)

    def work() -> None:
        tree = configuration.load_yaml(options.recipe) if options.recipe else {}
        tree = configuration.expand_variables(configuration.apply_assignments(tree, options.set))
        for assignment in options.set:
            STAGE.check_section(assignment)
        config = STAGE.load_config(STAGE.section(tree))
        artifacts.read(options.dataset, "dataset")
        found = plan(config, options.dataset)
        print(json.dumps(dataclasses.asdict(found)) if options.json else describe(found, config))

    return stage.exit_code(work)


def plan(config: PretrainConfig, dataset: Path) -> RunPlan:
    """Return what a run of ``config.num_ranks`` ranks will need and do.

    Raises:
        UserError: the configuration contradicts itself or the dataset.
    """
    deepspeed_settings(config, num_ranks=config.num_ranks)  # tells what contradicts itself
    table = SampleTable.read(dataset)
    split = split_rows(table, config)
    batches = make_plan(split, config, num_ranks=config.num_ranks)
    # as if they were near: nothing is opened, and no cache made
    check_room(batches, open_shards(dataset, table, ShardsConfig()), config.loader)
    texts = list(itertools.islice(filter(None, read_texts(dataset)), _MAX_TEXTS))
    words = _words(config, texts)
    architecture = config.encoder.architecture(words.vocabulary_size)
    target = planned_target(config, architecture, table)
    architecture = _fitted(architecture, config, target)
    micro, all_steps = batches.micro_batch_size, config.epochs * batches.steps_per_epoch
    with torch.device("meta"):
        model = MaskedModel(architecture, config.objective, target)
    sizes = [parameter.numel() for parameter in model.parameters()]
    num_frozen = sum(tensor.numel() for tensor in model.encoder.frozen_state().values())
    mean_length = sum(len(words(text)) for text in texts) / max(len(texts), 1)
    return RunPlan(
        num_ranks=config.num_ranks,
        num_parameters=sum(sizes) + num_frozen,
        num_encoder_parameters=num_frozen + sum(p.numel() for p in model.encoder.parameters()),
        num_items=len(split.train),
        num_held_out=len(split.held_out),
        micro_batch_size=micro,
        accumulation=batches.accumulation,
        batch=describe_batch(batches),
        steps_per_epoch=batches.steps_per_epoch,
        num_steps=min(all_steps, config.max_steps or all_steps),
        text_tokens_per_epoch=round(mean_length * len(split.train)),
        patches_per_epoch=architecture.num_patches * len(split.train),
        num_texts_read=len(texts),
        memory={
            number: memory_per_rank(
                dataclasses.replace(
                    config,
                    zero_stage=number,
                    offload=config.offload if number >= OFFLOAD_STAGES[config.offload] else "none",
                ),
                architecture,
                num_parameters=sum(sizes),
                largest=max(sizes),
                num_ranks=config.num_ranks,
                num_frozen=num_frozen,
                target=target_size(config, architecture, target, micro_batch_size=micro),
            )
            for number in ZERO_STAGES
            if number or config.precision == "fp32"
        },
    )


def target_size(
    config: PretrainConfig,
    architecture: Architecture,
    target: PictureTarget,
    *,
    micro_batch_size: int,
) -> TargetSize:
    """Return what a picture target adds to a rank's memory."""
    masked = round(config.objective.patch_ratio * architecture.num_patches)
    return TargetSize(
        head_size=target.head_size,
        is_codes=config.objective.targets != "pixels",
        frozen_bytes=target.frozen_bytes,
        working_bytes=target.working_bytes(
            num_pictures=micro_batch_size, num_masked=micro_batch_size * masked
        ),
    )


def describe(found: RunPlan, config: PretrainConfig) -> str:
    """Return the plan for a person."""
    lines = [
        f"{found.num_encoder_parameters / 1e6:.2f} M parameters, with the heads "
        f"{found.num_parameters / 1e6:.2f} M",
        f"{found.num_items:,} items an epoch ({found.num_held_out:,} held out), about "
        f"{found.text_tokens_per_epoch:,} tokens of text and {found.patches_per_epoch:,} patches",
        f"{found.num_steps:,} steps ({found.steps_per_epoch:,} an epoch) of {found.batch}",
        f"memory of a rank in MiB, {config.precision} (Python and torch take about 400 more)",
        "ZeRO  parameters   master  moments  gradients  activations     peak  of it host",
    ]
    for number, memory in found.memory.items():
        cells = (
            (memory.parameters + memory.targets, 10),
            (memory.master, 8),
            (memory.moments, 8),
            (memory.gradients + memory.offload, 10),
            (memory.activations, 12),
            (memory.peak, 8),
            (memory.host, 11),
        )
        row = " ".join(f"{amount / _MEBIBYTE:{width}.1f}" for amount, width in cells)
        chosen = "  <- pretrain.zero_stage" if number == config.zero_stage else ""
        lines.append(f"{number:4d}  {row}{chosen}")
    return "\n".join(lines)


def _words(config: PretrainConfig, texts: list[str]) -> Words:
    """Return the given tokenizer, or one trained on these texts in place of all of them."""
    given = config.tokenizer.path
    tokenizer = read_given(given) if given else train(iter(texts), config.tokenizer.vocabulary_size)
    return as_words(tokenizer, max_length=config.encoder.max_text_tokens, source=str(given))


def _fitted(
    architecture: Architecture, config: PretrainConfig, target: PictureTarget
) -> Architecture:
    """Return the architecture with as many token embeddings as the given weights have.

    Raises:
        UserError: weights to start from cannot be read or do not fit.
    """
    checkpoint = config.initial.checkpoint
    if checkpoint is None:
        _check_towers(config.encoder)
        return architecture
    found = fit(
        rename(read_tensors(checkpoint)), config, architecture, source=checkpoint, picture=target
    )
    rows = len(found.tensors.get(TOKEN_EMBEDDINGS, range(architecture.vocabulary_size)))
    return dataclasses.replace(architecture, vocabulary_size=rows)


def _check_towers(encoder: EncoderConfig) -> None:
    """Read the weights of towers in folders; those of a hub are not fetched for a plan."""
    sources: dict[Modality, str | None] = {"vision": encoder.vision, "text": encoder.text}
    for modality, source in sources.items():
        if source is not None and Path(source).is_dir():
            read_weights(source, modality)
