"""The picture target of a run: prepared once, opened by every rank, estimated for a plan."""

import contextlib
from pathlib import Path

import torch

from alignrec import artifacts
from alignrec.data.shards import SampleTable
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.clustering import MAX_COMPONENTS
from alignrec.pretrain.codebook import CODEBOOK, Codebook, PatchFeatures, most_codes
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import open_training_data
from alignrec.pretrain.patch_sample import choose_pictures, sample_size, write_codebook
from alignrec.pretrain.targets import (
    CodebookTarget,
    PictureTarget,
    VqkdTarget,
    pixel_target,
)
from alignrec.pretrain.tokenizer import Words
from alignrec.pretrain.vqkd import (
    VQKD,
    check_grid,
    empty_tokenizer,
    load_tokenizer,
    needed_tensors,
    write_tokenizer_weights,
)
from alignrec.telemetry import Telemetry


def prepare_target(
    config: PretrainConfig,
    architecture: Architecture,
    *,
    dataset: Path,
    words: Words,
    draft: artifacts.Draft,
    device: torch.device,
    telemetry: Telemetry,
) -> None:
    """Write what the target needs, unless a killed run has left it (rank 0 calls it).

    Raises:
        UserError: there are no pictures to learn from, or the tokenizer cannot be used.
    """
    if config.objective.targets == "codebook" and not (draft.path / CODEBOOK).exists():
        with contextlib.closing(open_training_data(dataset, config, words, num_ranks=1)) as data:
            found = write_codebook(
                data,
                choose_pictures(SampleTable.read(dataset), config),
                config,
                architecture,
                target=draft.path / CODEBOOK,
                work=draft.work,
                device=device,
                telemetry=telemetry,
            )
        telemetry.say(_quality(found.facts))
    if config.objective.vqkd is not None and not (draft.work / VQKD).exists():
        write_tokenizer_weights(config.objective.vqkd, architecture, draft.work / VQKD)


def open_target(
    config: PretrainConfig, architecture: Architecture, folder: Path, device: torch.device
) -> PictureTarget:
    """Return the target from what ``prepare_target`` left in a draft's folder."""
    match config.objective.targets:
        case "codebook":
            codebook = Codebook.load(folder / CODEBOOK, device)
            return CodebookTarget(codebook, architecture.patch_size)
        case "vqkd":
            return VqkdTarget(load_tokenizer(folder / artifacts.WORK / VQKD, device))
        case "pixels":
            return pixel_target(architecture, normalise=config.objective.normalise_patches)


def planned_target(
    config: PretrainConfig, architecture: Architecture, table: SampleTable
) -> PictureTarget:
    """Return a target of the sizes that a run would have, without computing or holding it.

    Raises:
        UserError: there are no pictures to learn from, or the tokenizer cannot be used.
    """
    objective = config.objective
    if objective.targets == "codebook":
        count = most_codes(objective.num_codes, sample_size(table, config, architecture))
        return CodebookTarget(_empty_codebook(count, architecture), architecture.patch_size)
    if objective.vqkd is not None:
        tokenizer = empty_tokenizer(needed_tensors(objective.vqkd), objective.vqkd)
        check_grid(tokenizer, architecture, objective.vqkd)
        return VqkdTarget(tokenizer)
    return pixel_target(architecture, normalise=objective.normalise_patches)


def _empty_codebook(num_codes: int, architecture: Architecture) -> Codebook:
    values = architecture.patch_values
    with torch.device("meta"):
        features = PatchFeatures(
            torch.empty(MAX_COMPONENTS, values, dtype=torch.float64),
            torch.empty(MAX_COMPONENTS, dtype=torch.float64),
        )
        centers = torch.empty(num_codes, MAX_COMPONENTS)
        means = torch.empty(num_codes, values, dtype=torch.uint8)
        counts = torch.empty(num_codes, dtype=torch.int64)
    return Codebook(features, centers, means, counts, {})


def _quality(facts: dict[str, float]) -> str:
    return (
        f"codebook: {facts['num_codes']:,.0f} codes of {facts['num_patches']:,.0f} patches, "
        f"squared error {facts['quantisation_error']:.4f} (mean patch: "
        f"{facts['mean_patch_error']:.4f}), used as evenly as {facts['perplexity']:,.0f} equal ones"
    )
