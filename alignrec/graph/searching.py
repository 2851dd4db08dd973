"""Every item's nearest items, found in resumable chunks that ranks share (features -> item graph).

What is done lies in files of the work folder; each step begins when the files of the one before are
there, so a killed search goes on where it was, and ranks need nothing but barriers.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from alignrec import artifacts
from alignrec.data.shared_array import SharedArray, create_array, map_array
from alignrec.distributed.process_group import Rank, barrier
from alignrec.errors import StageFailure
from alignrec.graph import cells, knn, schema
from alignrec.graph.cells import CellIndex, Places
from alignrec.graph.config import GraphConfig
from alignrec.graph.knn import FeatureRows, Neighbors
from alignrec.graph.previous import (
    Previous,
    PreviousCells,
    open_previous,
    row_digests,
    updated_keys,
)
from alignrec.telemetry import Progress, Telemetry

# Rows that are searched, saved and counted as progress together.
_CHUNK_ROWS = 8192
# Share of the items that may come into kept cells before these are cut anew: the farther the cells
# are from the catalogue, the more of them must be looked into.
_MOST_ADDED = 0.2

Find = Callable[[Tensor], Neighbors]


@dataclasses.dataclass(frozen=True)
class Search:
    """One search for the neighbours of all items, as one rank sees it.

    Attributes:
        config: of the graph stage.
        features: (num_items, dim); may be memory-mapped.
        work: folder of what is done.
        rank: this rank.
        telemetry: for progress.
        earlier: folder of a graph to go on from.
    """

    config: GraphConfig
    features: npt.NDArray[np.floating]
    work: Path
    rank: Rank
    telemetry: Telemetry
    earlier: Path | None = None

    @property
    def num_items(self) -> int:
        """Number of items."""
        return len(self.features)

    @property
    def approximate(self) -> bool:
        """Whether this catalogue is searched by cells."""
        method = self.config.knn.method
        return method == "ann" or (method == "auto" and self.num_items > self.config.knn.auto_items)

    @property
    def settings(self) -> dict[str, Any]:
        """Return what the neighbour lists depend on beside the features."""
        return {
            "method": "ann" if self.approximate else "exact",
            "recall": self.config.knn.recall if self.approximate else 1.0,
            "k": self.config.k,
            "include_self": self.config.paper_compatible,
            "feature": f"{self.features.shape[1]} x {self.features.dtype.name}",
            "ties": "hash",  # of equally near items; before: the lower item_index
        }

    def run(self) -> dict[str, Any]:
        """Find every item's neighbours; collective. The lists are then in the work folder.

        Returns:
            Facts about the search; complete on rank 0.

        Raises:
            UserError: a feature is not finite, or the earlier graph is none or is damaged.
        """
        rows = FeatureRows(self.features, self.rank.device)
        self._make_chunks("digest", lambda start, stop: row_digests(self.features[start:stop]))
        previous = self._previous()
        lists = np.arange(self.num_items)
        if previous is not None and self._is_worth_updating(previous):
            lists = self._update(rows, previous)
        facts: dict[str, Any] = {
            "search": self.settings,
            "num_searched": len(lists),
            "num_updated": self.num_items - len(lists),
        }
        if self.approximate:
            index, found = self._build_index(rows, previous, num_searched=len(lists))
            places = np.flatnonzero(np.isin(index.items, lists))
            # A cell is read once for all queries that come together.
            self._find(
                places,
                index.items[places],
                lambda block: self._find_in_cells(index, block, found["probes"]),
                block_rows=_CHUNK_ROWS,
            )
            facts |= found
        else:
            self._find(
                lists,
                lists,
                lambda items: self._find_exactly(rows, items),
                block_rows=self.config.block_rows,
            )
        barrier(self.rank)
        return facts

    def write(self, folder: Path, facts: dict[str, Any]) -> None:
        """Put the chunks together as the artifact's neighbour lists; on one rank.

        Raises:
            StageFailure: the approximate search found less than it must.
        """
        shape = (self.num_items, self.config.k)
        path = functools.partial(schema.neighbors_path, folder)
        path("index").parent.mkdir(exist_ok=True)
        index = map_array(path("index"), np.int32, shape)
        cosine = map_array(path("cosine"), np.float32, shape)
        index[:] = -1
        for chunk in self._chunks_written():
            items = chunk["item"]
            index[items], cosine[items] = chunk["index"], chunk["cosine"]
        np.save(path("digest"), self._joined("digest"))
        if self.approximate:
            np.save(path("cell"), self._joined("cell"))
            shutil.copyfile(self.work / "centroids.npy", path("centroids"))
            facts["recall"] = self._recall(index, cosine)
        index.flush()
        cosine.flush()

    # Exact ----------------------------------------------------------------------------------------

    def _find_exactly(self, rows: FeatureRows, items: Tensor) -> Neighbors:
        return knn.nearest_items(
            rows,
            items,
            k=self.config.k,
            block_columns=self.config.block_columns,
            include_self=self.config.paper_compatible,
        )

    # From an earlier graph ------------------------------------------------------------------------

    def _previous(self) -> Previous | None:
        """Return what an earlier search has found, if it fits this one."""
        if self.earlier is None:
            return None
        previous = open_previous(self.earlier, self._joined("digest"), self.settings)
        if isinstance(previous, str):
            self.telemetry.say(f"{self.earlier} {previous}: all items are searched")
            return None
        return previous

    def _is_worth_updating(self, previous: Previous) -> bool:
        changed = f"{len(previous.changed):,} of {self.num_items:,} items are new or changed"
        if len(previous.changed) > self._most_changed:
            self.telemetry.say(
                f"{changed} since {self.earlier}, more than {self._most_changed:,}: to search all "
                f"items is faster than to update lists"
            )
            return False
        self.telemetry.say(f"{changed} since {self.earlier}")
        return True

    @property
    def _most_changed(self) -> int:
        """Changed items up to which an update is less work than a search of everything.

        Every unchanged item is compared with every changed one: in an exact search instead of
        with all items, twice over as the changed ones are searched too; by cells, beside what a
        search compares it with, of which the centroids are about half.
        """
        return cells.num_cells(self.num_items) if self.approximate else self.num_items // 2

    def _update(self, rows: FeatureRows, previous: Previous) -> npt.NDArray[np.int64]:
        """Update the lists of unchanged items and return the items still to be searched in full."""
        same = np.setdiff1d(np.arange(self.num_items), previous.changed, assume_unique=True)
        mine = list(self._mine("updated", same))
        with self._progress(mine, "updated items") as progress:
            for path, chunk in mine:
                items = torch.from_numpy(chunk)
                parts, incomplete = [], []
                for block in torch.split(items, self.config.block_rows):
                    keys, lacking = updated_keys(
                        rows,
                        previous,
                        block,
                        k=self.config.k,
                        block_columns=self.config.block_columns,
                    )
                    parts.append(knn.decode(keys, block.to(rows.device), self.config.k))
                    incomplete.append(lacking)
                    progress.update(len(block))
                _save_chunk(path, items, parts, torch.cat(incomplete))
        barrier(self.rank)
        written = [_load_chunk(path)["incomplete"] for path, _ in self._chunks("updated", same)]
        return np.union1d(previous.changed, np.concatenate([*written, np.empty(0, np.int64)]))

    # By cells -------------------------------------------------------------------------------------

    def _build_index(
        self, rows: FeatureRows, previous: Previous | None, *, num_searched: int
    ) -> tuple[CellIndex, dict[str, Any]]:
        """Sort the items into cells, all ranks together, and find how many cells to look into."""
        kept = self._kept_cells(previous)
        added = previous.changed if kept and previous else np.arange(self.num_items)
        centroids = self._centroids(rows, kept)
        self._make_chunks("cell", _cell_maker(rows, centroids, kept, added))
        cell = self._joined("cell")
        items, first = cells.cell_order(cell, len(centroids))
        # Where few items are searched, to sort all rows would cost more than to gather some.
        sort = num_searched == self.num_items
        vectors = self._sorted_rows(rows, items) if sort else _gathered_rows(rows, items)
        index = CellIndex(centroids, first, items, vectors)
        if self.rank.is_first and not (self.work / "probes.json").exists():
            self._choose_probes(rows, index, cell)
        barrier(self.rank)
        found = json.loads((self.work / "probes.json").read_text())
        self.telemetry.say(
            f"{found['cells']:,} cells of items{', kept' if kept else ''}, {found['probes']:,} "
            f"looked into for each item: recall {found['expected_recall']:.3f} of the "
            f"{self.config.k} nearest expected"
        )
        found["num_added"] = kept.num_added + len(added) if kept else 0
        return index, found

    def _kept_cells(self, previous: Previous | None) -> PreviousCells | None:
        """Return the earlier cells, unless too many items have come since they were cut."""
        if previous is None or previous.cells is None:
            return None
        added = previous.cells.num_added + len(previous.changed)
        return previous.cells if added <= _MOST_ADDED * self.num_items else None

    def _centroids(self, rows: FeatureRows, kept: PreviousCells | None) -> Tensor:
        path = self.work / "centroids.npy"
        if self.rank.is_first and not path.exists():
            count = cells.num_cells(self.num_items)
            _save(
                path,
                kept.centroids
                if kept
                else cells.train_centroids(rows, cells=count, seed=self.config.seed).cpu().numpy(),
            )
        barrier(self.rank)
        return torch.from_numpy(np.load(path)).to(self.rank.device)

    def _sorted_rows(
        self, rows: FeatureRows, items: npt.NDArray[np.int64]
    ) -> Callable[[Places], Tensor]:
        """Write the unit features in the order of cells, so that a cell is read in one piece."""
        path, spare = self.work / "sorted_rows.npy", self.work / "sorted_rows.writing.npy"
        # The first barrier of two, lest a slow rank look when a fast one has finished the file.
        missing = not path.exists()
        if missing and self.rank.is_first:
            create_array(spare, np.float32, (len(items), rows.dim))
        barrier(self.rank)
        if missing:
            with SharedArray.open(spare) as table:
                for start in self._my_starts(len(items)):
                    chunk = torch.from_numpy(items[start : start + _CHUNK_ROWS])
                    table.write(start, rows.take(chunk)[0].cpu().numpy())
        barrier(self.rank)
        if missing and self.rank.is_first:
            spare.replace(path)
        barrier(self.rank)
        result: npt.NDArray[np.float32] = np.load(path, mmap_mode="r")
        return lambda places: torch.from_numpy(np.array(result[places])).to(rows.device)

    def _choose_probes(
        self, rows: FeatureRows, index: CellIndex, cell: npt.NDArray[np.int32]
    ) -> None:
        """Find the fewest cells whose recall on half of a sample is surely enough.

        The exact neighbours of the other half are kept: what was chosen to do well on some items
        says too much of itself there. A sample of all items is itself what it stands for.
        """
        count = self.config.knn.sample
        sample = cells.sample_items(len(index.items), count, (self.config.seed, 2))
        sample = torch.from_numpy(index.items[sample.numpy()])
        exact = self._find_exactly(rows, sample)
        some = (exact.index[:, 0] >= 0).cpu()
        exact = Neighbors(exact.index.cpu()[some], exact.cosine.cpu()[some])
        sample = sample[some]
        step = 1 if count >= len(index.items) else 2
        choosing, measuring = slice(0, None, step), slice(step - 1, None, step)
        curves = cells.recall_by_probes(
            index,
            cell,
            rows.take(sample[choosing])[0],
            Neighbors(exact.index[choosing], exact.cosine[choosing]),
        )
        probes, expected = cells.fewest_probes(curves, self.config.knn.recall)
        others = Neighbors(exact.index[measuring], exact.cosine[measuring])
        _save_chunk(self.work / "sample.npz", sample[measuring], [others])
        facts = {
            "cells": len(index.centroids),
            "probes": probes,
            "expected_recall": round(expected, 4),
            "recall_sample": len(sample[measuring]),
            # Float sums of another number of threads or another CPU may make other cells.
            "cells_digest": hashlib.sha256(cell.tobytes()).hexdigest()[:16],
        }
        artifacts.write_json(self.work / "probes.json", facts)

    def _find_in_cells(self, index: CellIndex, places: Tensor, probes: int) -> Neighbors:
        return cells.search_cells(
            index,
            places.numpy(),
            k=self.config.k,
            probes=probes,
            include_self=self.config.paper_compatible,
        )

    def _recall(self, index: npt.NDArray[np.int32], cosine: npt.NDArray[np.float32]) -> float:
        sample = _load_chunk(self.work / "sample.npz")
        exact = Neighbors(torch.from_numpy(sample["index"]), torch.from_numpy(sample["cosine"]))
        items = sample["item"]
        found = Neighbors(
            torch.from_numpy(index[items].astype(np.int64)), torch.from_numpy(cosine[items])
        )
        recall, error = cells.measured_recall(found, exact)
        self.telemetry.say(
            f"recall {recall:.4f} of the {self.config.k} nearest (standard error {error:.4f}), "
            f"measured on {len(items):,} items"
        )
        # Two errors, as in the choice: by one sample or the other, enough may seem too little.
        if recall + 2 * error < self.config.knn.recall:
            raise StageFailure(
                f"the approximate neighbours have recall {recall:.4f}, below graph.knn.recall="
                f"{self.config.knn.recall} by more than two standard errors: the item graph would "
                f"miss near items. Raise graph.knn.sample or set graph.knn.method=exact."
            )
        return round(recall, 4)

    # Chunks ---------------------------------------------------------------------------------------

    def _my_starts(self, count: int) -> range:
        return range(0, count, _CHUNK_ROWS)[self.rank.index :: self.rank.world_size]

    def _make_chunks(self, name: str, make: Callable[[int, int], npt.NDArray[Any]]) -> None:
        """Make a row for each item, all ranks together."""
        for start in self._my_starts(self.num_items):
            path = self.work / f"{name}_{start:012d}.npy"
            if not path.exists():
                _save(path, make(start, min(start + _CHUNK_ROWS, self.num_items)))
        barrier(self.rank)

    def _joined(self, name: str) -> npt.NDArray[Any]:
        """Return what ``_make_chunks`` has made."""
        starts = range(0, self.num_items, _CHUNK_ROWS)
        return np.concatenate([np.load(self.work / f"{name}_{start:012d}.npy") for start in starts])

    def _find(
        self,
        queries: npt.NDArray[np.int64],
        items: npt.NDArray[np.int64],
        find: Find,
        *,
        block_rows: int,
    ) -> None:
        """Search this rank's chunks of the queries, which belong to the given items."""
        item_of = dict(self._chunks("neighbours", items))
        mine = list(self._mine("neighbours", queries))
        with self._progress(mine, "items") as progress:
            for path, chunk in mine:
                parts = []
                for block in torch.split(torch.from_numpy(chunk), block_rows):
                    parts.append(find(block))
                    progress.update(len(block))
                _save_chunk(path, torch.from_numpy(item_of[path]), parts)

    def _chunks(
        self, name: str, queries: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Path, npt.NDArray[np.int64]]]:
        for start in range(0, len(queries), _CHUNK_ROWS):
            path = self.work / f"{name}_{start:012d}.npz"
            yield path, queries[start : start + _CHUNK_ROWS]

    def _mine(
        self, name: str, queries: npt.NDArray[np.int64]
    ) -> Iterator[tuple[Path, npt.NDArray[np.int64]]]:
        """Yield this rank's chunks that are still to be done.

        A rank's share must not depend on what is there: the others write while this one looks.
        """
        for number, (path, chunk) in enumerate(self._chunks(name, queries)):
            if number % self.rank.world_size == self.rank.index and not path.exists():
                yield path, chunk

    def _progress(
        self, chunks: list[tuple[Path, npt.NDArray[np.int64]]], unit: str
    ) -> contextlib.AbstractContextManager[Progress]:
        return self.telemetry.progress(sum(len(chunk) for _, chunk in chunks), unit)

    def _chunks_written(self) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """Yield what the ranks found, updated lists before those that replace them."""
        for name in ("updated", "neighbours"):
            for path in sorted(self.work.glob(f"{name}_*[0-9].npz")):
                yield _load_chunk(path)


def _cell_maker(
    rows: FeatureRows,
    centroids: Tensor,
    kept: PreviousCells | None,
    added: npt.NDArray[np.int64],
) -> Callable[[int, int], npt.NDArray[np.int32]]:
    """Return what finds the cells of consecutive items: only of added ones where cells are kept."""

    def make(start: int, stop: int) -> npt.NDArray[np.int32]:
        cell = np.full(stop - start, -1, dtype=np.int32)
        if kept is not None:
            known = kept.cell[start:stop]
            cell[: len(known)] = known
        mine = added[np.searchsorted(added, start) : np.searchsorted(added, stop)]
        cell[mine - start] = cells.assign_cells(rows, centroids, mine)
        return cell

    return make


def _gathered_rows(rows: FeatureRows, items: npt.NDArray[np.int64]) -> Callable[[Places], Tensor]:
    return lambda places: rows.take(torch.from_numpy(items[places]))[0]


def _save_chunk(
    path: Path, items: Tensor, parts: list[Neighbors], incomplete: Tensor | None = None
) -> None:
    spare = path.with_suffix(".writing.npz")
    np.savez(
        spare,
        item=items.cpu().numpy(),
        index=torch.cat([part.index for part in parts]).cpu().numpy(),
        cosine=torch.cat([part.cosine for part in parts]).cpu().numpy(),
        incomplete=np.empty(0, np.int64) if incomplete is None else incomplete.cpu().numpy(),
    )
    spare.replace(path)


def _load_chunk(path: Path) -> dict[str, npt.NDArray[Any]]:
    with np.load(path) as file:
        return dict(file)


def _save(path: Path, array: npt.NDArray[Any]) -> None:
    spare = path.with_suffix(".writing.npy")
    np.save(spare, array)
    spare.replace(path)
