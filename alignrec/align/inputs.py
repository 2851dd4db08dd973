"""What stage 2 reads, checked against each other (dataset, features, graph -> trainers)."""

import dataclasses
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from alignrec import artifacts
from alignrec.align.propagation import SparseMatrix
from alignrec.data.csr import CSR
from alignrec.data.embeddings import check_same_dataset
from alignrec.data.schema import (
    Split,
    interactions_path,
    read_batches,
    read_interactions,
    read_removed_items,
)
from alignrec.errors import UserError

Array = npt.NDArray[np.generic]
_BATCH_ROWS = 1 << 20  # of a table that is read in parts: 16 MiB


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The three input artifacts, known to belong together.

    Attributes:
        dataset: folder.
        features: folder.
        graph: folder.
        num_users: users of the dataset.
        num_items: items of the dataset.
    """

    dataset: Path
    features: Path
    graph: Path
    num_users: int
    num_items: int

    @classmethod
    def open(cls, folders: Mapping[str, Path]) -> "Inputs":
        """Check that the artifacts belong together.

        Raises:
            UserError: counts or lineage differ, or a file is absent or damaged.
        """
        dataset = artifacts.read(folders["dataset"], "dataset")
        graph = artifacts.read(folders["graph"], "graph")
        features_manifest = artifacts.read(folders["features"], "features")
        check_same_dataset(folders["features"], folders["dataset"])
        for kind, given in (("dataset", dataset), ("features", features_manifest)):
            if graph.inputs.get(kind, {}).get("identity") != given.identity:
                raise UserError(
                    f"{folders['graph']} was built from another {kind} artifact than "
                    f"{folders[kind]}, so its edges would not fit. Run the graph stage again."
                )
        num_items = dataset.counts["num_items"]
        features = _load_array(folders["features"] / "features.npy")
        if features.ndim != 2 or features.shape[0] != num_items:
            raise UserError(
                f"{folders['features']}/features.npy has shape {list(features.shape)}, but the "
                f"dataset has {num_items} items: rows would belong to other items. Run the "
                f"features stage again on this dataset."
            )
        return cls(
            dataset=folders["dataset"],
            features=folders["features"],
            graph=folders["graph"],
            num_users=dataset.counts["num_users"],
            num_items=num_items,
        )

    def interactions(self, split: Split) -> CSR:
        """Return the items of each user in a split.

        Raises:
            UserError: the table is absent, or names users or items that the dataset has not.
        """
        users, items = read_interactions(self.dataset, split)
        try:
            return CSR.from_pairs(users, items, self.num_users, self.num_items)
        except ValueError as error:
            raise UserError(f"{interactions_path(self.dataset, split)}: {error}") from error

    def interaction_batches(
        self, split: Split
    ) -> Iterator[tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]]:
        """Yield (user_index, item_index) of a split, some rows in memory at a time.

        Raises:
            UserError: as ``interactions``.
        """
        path = interactions_path(self.dataset, split)
        columns = ["user_index", "item_index"]
        limits = torch.tensor([self.num_users, self.num_items])
        for batch in read_batches(path, batch_size=_BATCH_ROWS, columns=columns):
            pairs = torch.from_numpy(np.stack([batch[name].to_numpy() for name in columns]))
            outside = ((pairs < 0) | (pairs >= limits.unsqueeze(1))).any(dim=0)
            if outside.any():
                user, item = pairs[:, outside][:, 0].tolist()
                raise UserError(
                    f"{path}: user_index {user} and item_index {item} are not within the dataset's "
                    f"{self.num_users} users and {self.num_items} items: they belong to another "
                    f"dataset. Delete its folder and run data_prep again."
                )
            yield pairs[0], pairs[1]

    def removed_items(self) -> Int64[Tensor, " num_removed"]:
        """Return the items that the present catalogue does not have: nobody's candidates."""
        return torch.from_numpy(read_removed_items(self.dataset))

    def feature_table(self) -> Float[Tensor, "num_items f"]:
        """Return h_enc of every item as float32, in memory.

        Raises:
            UserError: a feature is NaN or infinite.
        """
        table = torch.from_numpy(
            np.array(_load_array(self.features / "features.npy"), dtype=np.float32)
        )
        bad = int((~torch.isfinite(table).all(dim=1)).sum())
        if bad:
            raise UserError(
                f"{self.features}/features.npy: {bad} of {self.num_items} rows are not finite, so "
                f"every embedding would become NaN. Extract the features again."
            )
        return table

    def similarities(self) -> SparseMatrix:
        """Return S, the normalised item-item graph.

        Raises:
            UserError: the file is absent, damaged or of another number of items.
        """
        path = self.graph / "similar.npz"
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                indptr, indices, values = (arrays[n] for n in ("indptr", "indices", "values"))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"cannot read {path}: {error}. Run the graph stage again.") from error
        if len(indptr) != self.num_items + 1:
            raise UserError(
                f"{path} has {len(indptr) - 1} items, but the dataset has {self.num_items}: rows "
                f"would belong to other items. Run the graph stage again on these features."
            )
        rows = torch.arange(self.num_items).repeat_interleave(torch.from_numpy(np.diff(indptr)))
        return SparseMatrix.from_entries(
            rows,
            torch.from_numpy(indices),
            torch.from_numpy(values),
            (self.num_items, self.num_items),
        )


def _load_array(path: Path) -> Array:
    try:
        array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}. Run its stage again.") from error
    return array
