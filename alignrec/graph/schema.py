"""Names of nodes, edges and files of the graph artifact (graph building -> alignment)."""

from pathlib import Path

NodeType = str
EdgeType = tuple[str, str, str]

USER: NodeType = "user"
ITEM: NodeType = "item"
NODE_TYPES: tuple[NodeType, ...] = (USER, ITEM)

RATES: EdgeType = (USER, "rates", ITEM)
REV_RATES: EdgeType = (ITEM, "rev_rates", USER)
SIMILAR: EdgeType = (ITEM, "similar", ITEM)
EDGE_TYPES: tuple[EdgeType, ...] = (RATES, REV_RATES, SIMILAR)

# Node ids of a type are int32 in lists, maps and files; edges are counted with 64 bits.
MAX_NODES = 2**31 - 1


def meta_path(graph: Path) -> Path:
    """Return the file of counts and types; its name is PyG's."""
    return graph / "META.json"


def node_map_path(graph: Path, node_type: NodeType) -> Path:
    """Return the file that has each node's partition."""
    return graph / "node_map" / f"{node_type}.pt"


def edge_map_path(graph: Path, edge_type: EdgeType) -> Path:
    """Return the file that has each edge's partition."""
    return graph / "edge_map" / f"{'__'.join(edge_type)}.pt"


def partition_path(graph: Path, partition: int) -> Path:
    """Return the folder of one partition."""
    return graph / f"part_{partition}"


def similar_path(graph: Path) -> Path:
    """Return the CSR file of the item-item graph."""
    return graph / "similar.npz"


def train_items_path(graph: Path) -> Path:
    """Return the file of the items with a training interaction: int32, ascending."""
    return graph / "train_items.npy"


def neighbors_path(graph: Path, name: str) -> Path:
    """Return a file of the items' neighbour lists: index, cosine or digest.

    After an approximate search also cell and centroids.
    """
    return graph / "neighbors" / f"{name}.npy"
