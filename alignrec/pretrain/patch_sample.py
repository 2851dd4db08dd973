"""A bounded sample of patches of the training pictures, as one file (dataset -> codebook)."""

import contextlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from alignrec.data.images import decode
from alignrec.data.loader import Loader, MicroBatch
from alignrec.data.shards import SampleTable
from alignrec.data.shared_array import SharedArray, create_array
from alignrec.errors import UserError
from alignrec.pretrain.architecture import Architecture
from alignrec.pretrain.codebook import Codebook, learn_codebook
from alignrec.pretrain.config import PretrainConfig
from alignrec.pretrain.data import TrainingData, split_rows
from alignrec.pretrain.encoder import cut_patches
from alignrec.telemetry import Telemetry

PATCHES_PER_PICTURE = 64  # more of one picture would say little about the others
_STREAM = 5  # stream number of this sample, apart from those of order, crops and masks
_PICTURES_AT_ONCE = 32

Ints = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]


def write_codebook(
    data: TrainingData,
    pictures: Ints,
    config: PretrainConfig,
    architecture: Architecture,
    *,
    target: Path,
    work: Path,
    device: torch.device,
    telemetry: Telemetry,
) -> Codebook:
    """Learn a codebook (rank 0 calls it).

    A killed run goes on: the sample is kept in ``work``, the centres after every pass.

    Args:
        data: gives the bytes of the pictures.
        pictures: rows of the sample table to learn from, in random order.
        config: settings.
        architecture: how pictures are cut into patches.
        target: file of the codebook, written by rename.
        work: folder of what is needed until then.
        device: where to compute.
        telemetry: shows the progress.
    """
    sample = work / "patches.npy"
    if not sample.exists():
        write_sample(data, pictures, config, architecture, target=sample, telemetry=telemetry)
    found = learn_codebook(
        np.load(sample, mmap_mode="r"),
        num_codes=config.objective.num_codes,
        seed=config.seed,
        device=device,
        telemetry=telemetry,
        state=work / "clusters.safetensors",
    )
    found.save(target)
    sample.unlink()
    return found


def write_sample(
    data: TrainingData,
    pictures: Ints,
    config: PretrainConfig,
    architecture: Architecture,
    *,
    target: Path,
    telemetry: Telemetry,
) -> None:
    """Write patches (sample, values) of pictures, by rename; all patches of one come together.

    Pictures are cropped at random as in training.
    """
    kept = patches_kept(architecture)
    spare = target.with_suffix(".writing")
    shape = (len(pictures) * kept, architecture.patch_values)
    # written by offset: who writes into a mapping dies of a full disk without a word
    create_array(spare, np.uint8, shape)
    loader = Loader(
        lambda batch: _read(data, batch, architecture, config.seed),
        num_threads=config.loader.num_threads,
        prefetch=config.loader.prefetch,
    )
    order = np.argsort(pictures)  # read in the order of the shards, which may be far away
    batches = (
        MicroBatch(0, pictures[order[start : start + _PICTURES_AT_ONCE]])
        for start in range(0, len(pictures), _PICTURES_AT_ONCE)
    )
    near = data.shards.fetched_ahead(batches, lambda batch: batch.rows)
    with (
        SharedArray.open(spare) as patches,
        contextlib.closing(loader.batches(near)) as stream,
        telemetry.progress(len(pictures), "pictures") as progress,
    ):
        start = 0
        for piece in stream:
            chosen = order[start : start + len(piece) // kept]
            for place, rows in zip(chosen, piece.reshape(len(chosen), kept, -1), strict=True):
                patches.write(int(place) * kept, rows)
            start += len(chosen)
            progress.update(len(chosen))
    spare.replace(target)


def choose_pictures(table: SampleTable, config: PretrainConfig) -> Ints:
    """Return the rows of at most ``codebook_pictures`` training items with a picture, shuffled.

    Raises:
        UserError: no training item has one.
    """
    train = split_rows(table, config).train
    rows: Ints = train[table.image_bytes[train] > 0]
    if len(rows) == 0:
        raise UserError(
            "pretrain.objective.targets=codebook: no training item has a picture, so there are no "
            "patches to learn codes from. Set it to pixels."
        )
    count = min(len(rows), config.objective.codebook_pictures)
    rng = np.random.default_rng([config.seed, _STREAM])
    return rng.choice(rows, size=count, replace=False)


def patches_kept(architecture: Architecture) -> int:
    """Return how many patches of each chosen picture are in the sample."""
    return min(PATCHES_PER_PICTURE, architecture.num_patches)


def sample_size(table: SampleTable, config: PretrainConfig, architecture: Architecture) -> int:
    """Return how many patches the codebook is learned on."""
    return len(choose_pictures(table, config)) * patches_kept(architecture)


def _read(data: TrainingData, batch: MicroBatch, architecture: Architecture, seed: int) -> Pixels:
    return np.concatenate([_patches(data, int(row), architecture, seed) for row in batch.rows])


def _patches(data: TrainingData, row: int, architecture: Architecture, seed: int) -> Pixels:
    """Return the chosen patches of one picture: (kept, values)."""
    sample = data.shards.read(row)
    rng = np.random.default_rng([seed, _STREAM, sample.item_index])
    name = f"item_index {sample.item_index}"
    image = decode(sample.image, size=architecture.image_size, rng=rng, name=name)
    patches = cut_patches(torch.from_numpy(image)[None], architecture.patch_size)[0].numpy()
    chosen: Pixels = patches[
        rng.choice(len(patches), size=patches_kept(architecture), replace=False)
    ]
    return chosen
