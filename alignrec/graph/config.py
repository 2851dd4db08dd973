"""Settings of the graph stage."""

import dataclasses
from typing import Literal

from alignrec.configuration import option


@dataclasses.dataclass(frozen=True)
class GraphConfig:
    """How the item-item graph is built and how the whole graph is cut into partitions."""

    k: int = option(10, "nearest neighbours that each item chooses by cosine", minimum=1)
    similarity_weight: Literal["cosine", "binary"] = option(
        "cosine", "weight of an item-item edge before it is normalised: its cosine, or 1"
    )
    paper_compatible: bool = option(
        False, "item-item graph as in the released code: an item is its own neighbour, directed"
    )
    num_partitions: int = option(4, "parts that the graph is cut into", minimum=1)
    partition_method: Literal["metis", "hash"] = option(
        "metis", "metis: few edges between partitions; hash: for graphs too large for METIS"
    )
    partition_similar_edges: bool = option(
        True, "whether METIS counts item-item edges between partitions too"
    )
    seed: int = option(0, "seed of the partitioner", minimum=0)
    block_rows: int = option(1024, "items compared at once, rows", minimum=1, affects_result=False)
    block_columns: int = option(
        8192,
        "items compared at once, columns; memory is 20 bytes x rows x columns",
        minimum=1,
        affects_result=False,
    )
