"""Graph stage: training interactions and content features in, edges and partitions out.

Ranks share the nearest-neighbour search and the writing of partitions; no rank holds all edges,
but for METIS, which is for graphs that one process can hold.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from alignrec import artifacts, configuration
from alignrec.artifacts import Draft, partial_path
from alignrec.data import schema as dataset_schema
from alignrec.data.embeddings import check_same_dataset
from alignrec.distributed.process_group import Rank, barrier, process_group
from alignrec.errors import StageFailure, UserError
from alignrec.graph import STAGE, layout, schema
from alignrec.graph.config import GraphConfig
from alignrec.graph.edges import GraphStreams, count_degrees
from alignrec.graph.partition import Assignment, partitioner
from alignrec.graph.scattering import ScatteredEdges, scatter_edges
from alignrec.graph.schema import ITEM, NODE_TYPES, USER
from alignrec.graph.searching import Search
from alignrec.graph.similarity import open_similarity, pack_similarity, write_similarity
from alignrec.stage import EARLIER, Context
from alignrec.telemetry import Telemetry

# Largest partition over the average, in edges, from which on the log says so.
_UNEVEN = 1.5


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the graph is built from.

    Attributes:
        interactions: parquet file of the training interactions.
        num_users: number of users, with or without interactions.
        num_items: number of items.
        features: (num_items, dim), memory-mapped.
    """

    interactions: Path
    num_users: int
    num_items: int
    features: npt.NDArray[np.floating]


def run(config: GraphConfig, context: Context) -> None:
    """Build the graph artifact; collective."""
    with (
        process_group(timeout_seconds=config.timeout_seconds, backend=STAGE.backend) as rank,
        Telemetry(context.log_dir, "graph", enabled=rank.is_first) as telemetry,
    ):
        inputs = read_inputs(context.inputs["dataset"], context.inputs["features"])
        check_partitions(config, inputs)
        previous, lineage = earlier_graph(config, context)
        draft = Draft(partial_path(context.output))
        if rank.is_first:
            artifacts.open_draft(context.output, fingerprint=context.fingerprint)
            write_degrees(inputs, draft.work)
        barrier(rank)
        search = Search(config, inputs.features, draft.work, rank, telemetry, previous)
        facts = search.run()
        if rank.is_first:
            search.write(draft.path, facts)
            draft.facts.update(facts | lineage)
            write_item_graph(config, draft)
        barrier(rank)
        write_graph(config, inputs, draft, rank, telemetry)
        if rank.is_first:
            artifacts.publish(
                draft,
                context.output,
                kind="graph",
                fingerprint=context.fingerprint,
                config=configuration.to_mapping(config),
                inputs={kind: context.inputs[kind] for kind in ("dataset", "features")},
            )


def read_inputs(dataset: Path, features: Path) -> Inputs:
    """Map the features and look whether they are those of the dataset.

    Raises:
        UserError: the inputs do not fit each other.
    """
    counts = artifacts.read(dataset, "dataset").counts
    num_users, num_items = counts["num_users"], counts["num_items"]
    if max(num_users, num_items) > schema.MAX_NODES:
        raise UserError(
            f"{dataset} has {num_users} users and {num_items} items, but the graph numbers at most "
            f"{schema.MAX_NODES} of each: larger numbers would be other nodes. Prepare fewer, as "
            f"with data_prep.interactions.min_user_interactions."
        )
    check_same_dataset(features, dataset)
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
    interactions = dataset_schema.interactions_path(dataset, "train")
    return Inputs(interactions, num_users, num_items, rows)


def check_partitions(config: GraphConfig, inputs: Inputs) -> None:
    """Refuse more partitions than could have a node each.

    Raises:
        UserError: there are.
    """
    num_nodes = inputs.num_users + inputs.num_items
    if config.num_partitions > num_nodes:
        raise UserError(
            f"graph.num_partitions={config.num_partitions} is more than the {num_nodes} users and "
            f"items: most partitions would be empty, and METIS may put everything into one. Lower "
            f"it, to 2 to 4 times the ranks of align."
        )


def earlier_graph(config: GraphConfig, context: Context) -> tuple[Path | None, dict[str, Any]]:
    """Return the graph that the search goes on from, and what the result tells of it.

    What is made again, as asked, does not go on from itself, but tells what it once went on from.

    Raises:
        UserError: what is named is no graph.
        StageFailure: it was replaced since the run was started.
    """
    if config.goes_on_from is None:
        return None, {}
    if STAGE.fingerprint(config, context.inputs, context.output) != context.fingerprint:
        raise StageFailure(
            f"knn.previous={config.goes_on_from} or an input was replaced since this run was "
            f"started, so it would go on from something else. Run the same command again."
        )
    manifest = config.earlier()
    if manifest is None:
        return None, {}
    if manifest.fingerprint == context.fingerprint:
        return None, {name: fact for name, fact in manifest.facts.items() if name == EARLIER}
    told = {"graph": str(config.goes_on_from), "identity": manifest.identity}
    return config.goes_on_from, {EARLIER: told}


def write_degrees(inputs: Inputs, work: Path) -> None:
    """Count every node's training interactions, once for all ranks; on one rank.

    Raises:
        UserError: there is nothing to build a graph from, or an interaction is of unknown nodes.
    """
    degree = count_degrees(
        inputs.interactions, num_users=inputs.num_users, num_items=inputs.num_items
    )
    for node_type, counts in degree.items():
        np.save(work / f"degree_{node_type}.npy", counts)


def write_item_graph(config: GraphConfig, draft: Draft) -> None:
    """Turn the neighbour lists into the normalised item-item matrix; on one rank."""
    write_similarity(
        np.load(schema.neighbors_path(draft.path, "index"), mmap_mode="r"),
        np.load(schema.neighbors_path(draft.path, "cosine"), mmap_mode="r"),
        draft.work / "similar",
        weight=config.similarity_weight,
        symmetric=not config.paper_compatible,
    )
    pack_similarity(draft.work / "similar", schema.similar_path(draft.path))


def write_graph(
    config: GraphConfig, inputs: Inputs, draft: Draft, rank: Rank, telemetry: Telemetry
) -> None:
    """Assign nodes to partitions and write these, with the facts about them; collective."""
    graph = GraphStreams(
        inputs.interactions,
        {t: np.load(draft.work / f"degree_{t}.npy") for t in NODE_TYPES},
        open_similarity(draft.work / "similar"),
    )
    parts, method = assign(config, graph, draft.work, rank)
    scattered = scatter_edges(
        graph, parts, draft.work / "edges", num_partitions=config.num_partitions, rank=rank
    )
    half = config.partition_features == "float16"
    feature_dtype = np.dtype(np.float16) if half else inputs.features.dtype
    for partition in range(config.num_partitions)[rank.index :: rank.world_size]:
        layout.write_partition(
            draft.path,
            graph,
            scattered,
            parts,
            partition,
            features=inputs.features,
            feature_dtype=feature_dtype,
        )
    barrier(rank)
    if not rank.is_first:
        return
    layout.write_maps(
        draft.path,
        graph,
        scattered,
        parts,
        num_partitions=config.num_partitions,
        num_features=inputs.features.shape[1],
        feature_dtype=feature_dtype,
    )
    train_items = np.flatnonzero(graph.degree[ITEM]).astype(np.int32)
    np.save(schema.train_items_path(draft.path), train_items)
    record(config, graph, scattered, parts, draft)
    draft.facts["partition_method"] = method
    telemetry.say(
        f"{draft.counts['num_train']:,} interactions, {draft.counts['num_similar']:,} item-item "
        f"edges, {config.num_partitions} partitions by {method}: "
        f"{draft.facts['edge_cut']['user__rates__item']:.1%} of interactions cut"
    )
    uneven = draft.facts["balance"]["all_edges"]
    if uneven > _UNEVEN:
        telemetry.say(
            f"warning: the largest partition has {uneven:.1f} times the average number of edges, "
            f"and its rank needs as much more memory and time; fewer partitions, or another "
            f"graph.partition_method, may be more even"
        )


def assign(
    config: GraphConfig, graph: GraphStreams, work: Path, rank: Rank
) -> tuple[Assignment, str]:
    """Return every node's partition and how it was chosen, by one rank for all; collective.

    A resumed stage finds it in the work folder.
    """
    if rank.is_first:
        path, spare = work / "parts.npz", work / "parts.writing.npz"
        if not path.exists():
            chosen = partitioner(config, graph, work / "restreaming")
            parts = chosen.assign(graph, config.num_partitions)
            np.savez(spare, user=parts[USER], item=parts[ITEM], method=np.array(chosen.name))
            spare.replace(path)
    barrier(rank)
    with np.load(work / "parts.npz") as file:
        return {node_type: file[node_type] for node_type in NODE_TYPES}, str(file["method"])


def record(
    config: GraphConfig,
    graph: GraphStreams,
    scattered: ScatteredEdges,
    parts: Assignment,
    draft: Draft,
) -> None:
    """Fill in the counts and facts of the artifact."""
    neighbours = np.diff(graph.similar.indptr)
    draft.counts.update(
        num_users=graph.num_nodes[USER],
        num_items=graph.num_nodes[ITEM],
        num_train=graph.num_edges[schema.RATES],
        num_train_items=int((graph.degree[ITEM] > 0).sum()),
        num_similar=graph.num_edges[schema.SIMILAR],
        num_partitions=config.num_partitions,
    )
    draft.facts.update(
        scattered.facts(parts, config.num_partitions),
        k=config.k,
        num_without_neighbours=int((neighbours == 0).sum()),
        mean_neighbours=round(float(neighbours.mean()), 2),
    )
