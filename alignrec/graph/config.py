"""Settings of the graph stage."""

import dataclasses
from pathlib import Path
from typing import Literal

from alignrec.artifacts import Manifest
from alignrec.configuration import option
from alignrec.errors import UserError
from alignrec.stage import earlier_manifest


@dataclasses.dataclass(frozen=True)
class KnnConfig:
    """How the nearest items are searched."""

    method: Literal["auto", "exact", "ann"] = option(
        "auto", "exact: all pairs; ann: only near cells of items; auto: ann above auto_items"
    )
    auto_items: int = option(
        200_000, "items above which method auto is approximate: exact work is quadratic", minimum=1
    )
    recall: float = option(
        0.95,
        "share of the exact neighbours that method ann must find, on a sample of items",
        minimum=0.01,
        maximum=1.0,
    )
    sample: int = option(
        1000,
        "items whose exact neighbours are found for method ann: half of them choose how far it "
        "looks, its recall is measured on the others",
        minimum=50,
    )
    previous: Path | None = option(
        None,
        "folder of an earlier graph artifact: only new or changed items are searched; may be the "
        "one that this stage writes",
        affects_result=False,  # what lies there counts: GraphConfig.earlier
    )
    optional: bool = option(
        False,
        "search all items where nothing is at knn.previous yet, as on the first night",
        affects_result=False,
    )

    def __post_init__(self) -> None:
        """Refuse a setting that another one makes idle.

        Raises:
            UserError: a setting for an earlier graph that is not named.
        """
        if self.optional and self.previous is None:
            raise UserError(
                "knn.optional=True has no effect without knn.previous. Leave it out or name a "
                "folder."
            )


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """How the item-item graph is built and how the whole graph is cut into partitions."""

    num_ranks: int = option(
        1,
        "processes that search neighbours and write partitions together",
        minimum=1,
        affects_result=False,
    )
    k: int = option(10, "nearest neighbours that each item chooses by cosine", minimum=1)
    knn: KnnConfig = option(KnnConfig(), "search of the nearest neighbours")
    similarity_weight: Literal["cosine", "binary"] = option(
        "cosine", "weight of an item-item edge before it is normalised: its cosine, or 1"
    )
    paper_compatible: bool = option(
        False, "item-item graph as in the released code: an item is its own neighbour, directed"
    )
    num_partitions: int = option(4, "parts that the graph is cut into", minimum=1)
    partition_method: Literal["auto", "metis", "streaming", "hash"] = option(
        "auto",
        "metis: fewest edges between partitions, one process holds all edges; streaming: in memory "
        "for nodes alone; hash: without looking at edges; auto: metis up to metis_edges",
    )
    metis_edges: int = option(
        20_000_000, "edges up to which partition_method auto is metis", minimum=0
    )
    partition_similar_edges: bool = option(
        True, "whether item-item edges between partitions count too"
    )
    partition_features: Literal["as_given", "float16"] = option(
        "as_given", "numbers of the content features in the partitions; float16 halves float32"
    )
    seed: int = option(0, "seed of the partitioner and of the approximate search", minimum=0)
    block_rows: int = option(1024, "items compared at once, rows", minimum=1, affects_result=False)
    block_columns: int = option(
        8192,
        "items compared at once, columns; memory is 20 bytes x rows x columns",
        minimum=1,
        affects_result=False,
    )

    timeout_seconds: float = option(
        14_400.0,
        "how long a rank waits for a silent peer: as long as rank 0 assigns nodes to partitions or "
        "as searches end apart; the death of a rank is noticed at once",
        minimum=1,
        affects_result=False,
    )

    @property
    def goes_on_from(self) -> Path | None:
        """Folder of the earlier graph that is named."""
        return self.knn.previous

    def earlier(self) -> Manifest | None:
        """Return the manifest of the graph that the search goes on from, if there is any.

        Raises:
            UserError: it is named, not optional, and no finished graph.
            StageFailure: it is being replaced by another run.
        """
        return earlier_manifest(
            self.knn.previous, "graph", optional=self.knn.optional, setting="knn.previous"
        )
