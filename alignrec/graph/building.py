"""Graph stage: training interactions and content features in, edges and partitions out."""

import dataclasses
from pathlib import Path

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp
import torch

from alignrec import artifacts, configuration
from alignrec.artifacts import Draft, partial_path
from alignrec.data import schema as dataset_schema
from alignrec.data.embeddings import check_same_dataset
from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.errors import UserError
from alignrec.graph import knn, schema
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import WholeGraph, whole_graph
from alignrec.graph.layout import write_partitions
from alignrec.graph.partition import partition_facts, partitioner
from alignrec.stage import Context
from alignrec.telemetry import Telemetry

# Rows that are searched, saved and counted as progress together.
_CHUNK_ROWS = 8192
# The ranks wait for each other only once, after searches of very different length.
_SEARCH_TIMEOUT_SECONDS = 3600.0


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the graph is built from.

    Attributes:
        users: user_index of each training interaction.
        items: item_index of each training interaction.
        features: (num_items, dim), memory-mapped.
    """

    users: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    num_users: int
    num_items: int
    features: npt.NDArray[np.floating]


def run(config: GraphConfig, context: Context) -> None:
    """Build the graph artifact; several ranks share the nearest-neighbour search."""
    with (
        process_group(timeout_seconds=_SEARCH_TIMEOUT_SECONDS) as rank,
        Telemetry(context.log_dir, "graph", enabled=rank.is_first) as telemetry,
    ):
        inputs = read_inputs(context.inputs["dataset"], context.inputs["features"])
        if rank.is_first:
            artifacts.open_draft(context.output, fingerprint=context.fingerprint)
        barrier(rank)
        draft = Draft(partial_path(context.output))
        search(config, inputs.features, draft.work, rank, telemetry)
        barrier(rank)
        if not rank.is_first:
            return
        similar = read_similarity(config, inputs.num_items, draft.work)
        graph = whole_graph(
            inputs.users,
            inputs.items,
            num_users=inputs.num_users,
            num_items=inputs.num_items,
            similar=similar,
        )
        write_graph(config, inputs, graph, similar, draft, telemetry)
        artifacts.publish(
            draft,
            context.output,
            kind="graph",
            fingerprint=context.fingerprint,
            config=configuration.to_mapping(config),
            inputs={kind: context.inputs[kind] for kind in ("dataset", "features")},
        )


def read_inputs(dataset: Path, features: Path) -> Inputs:
    """Read the dataset's training interactions and map the features.

    Raises:
        UserError: there is nothing to build a graph from, or the inputs do not fit each other.
    """
    counts = artifacts.read(dataset, "dataset").counts
    num_users, num_items = counts["num_users"], counts["num_items"]
    check_same_dataset(features, dataset)
    users, items = dataset_schema.read_interactions(dataset, "train")
    try:
        rows = np.load(features / "features.npy", mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{features / 'features.npy'} cannot be read ({error}), so no item has neighbours. Run "
            f"the features stage again."
        ) from error
    if rows.ndim != 2 or len(rows) != num_items:
        raise UserError(
            f"{features / 'features.npy'} has shape {rows.shape}, but the dataset {dataset} has "
            f"{num_items} items: rows would belong to other items. Run the features stage on this "
            f"dataset."
        )
    if len(users) == 0:
        raise UserError(
            f"{dataset_schema.interactions_path(dataset, 'train')} has no interactions, so there "
            f"is no graph to learn from. Check the log that data_prep read and its filters."
        )
    for name, ids, limit in (("user", users, num_users), ("item", items, num_items)):
        if ids.min() < 0 or ids.max() >= limit:
            raise UserError(
                f"{dataset_schema.interactions_path(dataset, 'train')} has {name}_index "
                f"{ids.max() if ids.max() >= limit else ids.min()}, outside of 0..{limit - 1}. "
                f"Run data_prep again."
            )
    return Inputs(users, items, num_users, num_items, rows)


def search(
    config: GraphConfig,
    features: npt.NDArray[np.floating],
    work: Path,
    rank: Rank,
    telemetry: Telemetry,
) -> None:
    """Find every item's neighbours; chunks that a killed run finished are kept."""
    rows = knn.FeatureRows(features, rank.device)
    # A rank's share must not depend on what is there: the others write while this one looks.
    starts = range(0, rows.num_items, _CHUNK_ROWS)[rank.index :: rank.world_size]
    mine = [start for start in starts if not _chunk_path(work, start).exists()]
    with telemetry.progress(
        sum(_chunk_size(start, rows.num_items) for start in mine), "items"
    ) as p:
        for start in mine:
            stop = start + _chunk_size(start, rows.num_items)
            parts = []
            for first in range(start, stop, config.block_rows):
                last = min(first + config.block_rows, stop)
                parts.append(
                    knn.nearest_items(
                        rows,
                        start=first,
                        stop=last,
                        k=config.k,
                        block_columns=config.block_columns,
                        include_self=config.paper_compatible,
                    )
                )
                p.update(last - first)
            _save_chunk(_chunk_path(work, start), parts)


def read_similarity(config: GraphConfig, num_items: int, work: Path) -> sp.csr_matrix:
    """Read the chunks of neighbours and return the normalised item-item matrix."""
    index, cosine = [], []
    for start in range(0, num_items, _CHUNK_ROWS):
        with np.load(_chunk_path(work, start)) as chunk:
            index.append(torch.from_numpy(chunk["index"]))
            cosine.append(torch.from_numpy(chunk["cosine"]))
    return knn.similarity_graph(
        knn.Neighbors(torch.cat(index), torch.cat(cosine)),
        weight=config.similarity_weight,
        symmetric=not config.paper_compatible,
    )


def write_graph(
    config: GraphConfig,
    inputs: Inputs,
    graph: WholeGraph,
    similar: sp.csr_matrix,
    draft: Draft,
    telemetry: Telemetry,
) -> None:
    """Write partitions, the item-item matrix and the facts about them."""
    parts = partitioner(config).assign(graph, config.num_partitions)
    write_partitions(
        draft.path,
        graph,
        parts,
        num_partitions=config.num_partitions,
        features=inputs.features,
    )
    np.savez(
        schema.similar_path(draft.path),
        indptr=similar.indptr.astype(np.int64),
        indices=similar.indices.astype(np.int32),
        values=similar.data,
    )
    train_items = np.flatnonzero(graph.degree[schema.ITEM]).astype(np.int32)
    np.save(schema.train_items_path(draft.path), train_items)
    facts = partition_facts(graph, parts, config.num_partitions)
    neighbours = np.diff(similar.indptr)
    draft.counts.update(
        num_users=inputs.num_users,
        num_items=inputs.num_items,
        num_train=len(inputs.users),
        num_train_items=len(train_items),
        num_similar=int(similar.nnz),
        num_partitions=config.num_partitions,
    )
    draft.facts.update(
        facts,
        k=config.k,
        num_without_neighbours=int((neighbours == 0).sum()),
        mean_neighbours=round(float(neighbours.mean()), 2),
    )
    telemetry.say(
        f"{len(inputs.users):,} interactions, {similar.nnz:,} item-item edges, "
        f"{config.num_partitions} partitions by {config.partition_method}: "
        f"{facts['edge_cut']['user__rates__item']:.1%} of interactions cut"
    )


def _chunk_path(work: Path, start: int) -> Path:
    return work / f"neighbours_{start:012d}.npz"


def _chunk_size(start: int, num_items: int) -> int:
    return min(_CHUNK_ROWS, num_items - start)


def _save_chunk(path: Path, parts: list[knn.Neighbors]) -> None:
    spare = path.with_suffix(".writing.npz")
    np.savez(
        spare,
        index=torch.cat([part.index for part in parts]).cpu().numpy(),
        cosine=torch.cat([part.cosine for part in parts]).cpu().numpy(),
    )
    spare.replace(path)
