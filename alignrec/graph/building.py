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
from alignrec.distributed.process_group import barrier, process_group
from alignrec.errors import UserError
from alignrec.graph import knn, schema
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import WholeGraph, whole_graph
from alignrec.graph.layout import write_partitions
from alignrec.graph.partition import partition_facts, partitioner
from alignrec.graph.searching import Search
from alignrec.stage import Context
from alignrec.telemetry import Telemetry

# The ranks wait for each other after searches of very different length.
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
        search = Search(config, inputs.features, draft.work, rank, telemetry)
        facts = search.run()
        if not rank.is_first:
            return
        search.write(draft.path, facts)
        draft.facts.update(facts)
        similar = read_similarity(config, draft.path)
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


def read_similarity(config: GraphConfig, folder: Path) -> sp.csr_matrix:
    """Return the normalised item-item matrix of the neighbour lists."""
    index = np.load(schema.neighbors_path(folder, "index"))
    cosine = np.load(schema.neighbors_path(folder, "cosine"))
    return knn.similarity_graph(
        knn.Neighbors(torch.from_numpy(index.astype(np.int64)), torch.from_numpy(cosine)),
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
