"""Settings of the features stage: from the encoder, or from files."""

import dataclasses
from pathlib import Path
from typing import Literal

from alignrec import configuration
from alignrec.configuration import option, watchdog_option
from alignrec.data.config import ShardsConfig
from alignrec.errors import UserError


@dataclasses.dataclass(frozen=True)
class FeatureFile:
    """One .npy matrix to import: row r belongs to item_index r."""

    path: Path = option(help="a .npy file of (num_items, columns) numbers")
    modality: Literal["image", "text"] = option(help="what the rows describe")
    center: bool = option(False, "subtract the column means first")


@dataclasses.dataclass(frozen=True)
class ExtractionConfig:
    """How the encoder's output becomes one row per item."""

    pooling: Literal["cls", "mean", "all"] = option(
        "cls",
        "cls: the CLS state (the paper's); mean: patch mean beside token mean, each centred and "
        "whitened on its own, so that the half of an absent modality stays zero; all: these two, "
        "the CLS state and, of kind towers, what each tower says by itself, each of length 1",
    )
    precision: Literal["fp32", "bf16"] = option(
        "fp32",
        "number format of the encoder's matrix products; bf16 is faster on GPUs, and a row's "
        "direction is that of fp32 within a few thousandths",
    )
    center: bool = option(True, "subtract the column means over all items with content")
    whiten: float = option(
        0.0,
        "0: as the encoder gives them; 1: decorrelated, the same variance in each direction; "
        "between: variances to the power 1 - whiten",
        minimum=0.0,
        maximum=1.0,
    )
    normalise: bool = option(True, "scale rows to length 1")
    hide: Literal["nothing", "image", "text"] = option(
        "nothing", "modality that hide_fraction of the items lose, to measure what it is worth"
    )
    hide_fraction: float = option(
        0.5, "share of items that lose the modality named by hide", minimum=0, maximum=1
    )
    hide_seed: int = option(0, "of the permutation whose first items lose it", minimum=0)

    def __post_init__(self) -> None:
        """Refuse a setting that another one makes wrong.

        Raises:
            UserError: whitening rows that are not centred.
        """
        if self.whiten and not self.center:
            raise UserError(
                f"features.extraction.whiten={self.whiten} needs centred rows: their mean would "
                f"pass for the main direction. Set center: true, or whiten: 0."
            )


@dataclasses.dataclass(frozen=True)
class FeaturesConfig:
    """One content feature per item: from the encoder, or the unit rows of files side by side.

    Rows are the same for any number of ranks.
    """

    num_ranks: int = option(1, "processes that extract together", minimum=1, affects_result=False)
    files: tuple[FeatureFile, ...] = option(
        (), "matrices to import instead of encoding: each row scaled to length 1, then joined"
    )
    extraction: ExtractionConfig = option(ExtractionConfig(), "how the encoder is used")
    dtype: Literal["float32", "float16"] = option("float32", "number format of the rows")
    batch_size: int = option(64, "items encoded at once by a rank", minimum=1, affects_result=False)
    num_threads: int = option(
        1, "threads a rank decodes with", minimum=1, maximum=64, affects_result=False
    )
    shards: ShardsConfig = option(
        ShardsConfig(), "where the shards are, if not in the dataset", affects_result=False
    )
    timeout_seconds: float = option(
        300.0, "how long a rank waits for a silent peer", minimum=1, affects_result=False
    )
    watchdog_seconds: float | None = watchdog_option()

    def source_identity(self) -> str:
        """Return a digest of the imported files' paths, sizes and times."""
        state = []
        for file in self.files:
            found = file.path.stat() if file.path.exists() else None
            state.append(
                [str(file.path), found.st_size if found else 0, found.st_mtime_ns if found else 0]
            )
        return configuration.digest(state)
