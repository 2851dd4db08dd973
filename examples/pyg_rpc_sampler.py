"""Sample our partitions with PyG's own distributed loader, for those who have pyg-lib.

    torchrun --nproc-per-node 4 examples/pyg_rpc_sampler.py runs/demo/graph --batches 5

``alignrec.graph`` samples without pyg-lib and is what the align stage uses; this shows that the
folders of the graph stage are ordinary PyG partitions. It needs

* as many ranks as the graph has partitions (``graph.num_partitions``): PyG knows no other way;
* pyg-lib, which is not on PyPI: https://data.pyg.org/whl has wheels for each version of torch;
* PyG 2.6 or 2.7. In 2.8.0 and 2.8.1 the distributed sampler raises TypeError when it is made, by a
  misspelt argument of ``warnings.warn``; the module is deprecated since 2.7 and not maintained.

Nodes are the seeds here, not interactions: PyG's negative sampling for distributed links misses an
argument in 2.6.1 to 2.8.1.
"""

import argparse
import importlib.util
import itertools
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch_geometric
from torch_geometric.distributed import LocalFeatureStore, LocalGraphStore

from alignrec import artifacts
from alignrec.distributed.process_group import process_group
from alignrec.errors import UserError
from alignrec.graph.layout import read_meta
from alignrec.graph.schema import EDGE_TYPES, ITEM, NODE_TYPES, RATES, REV_RATES, SIMILAR, USER
from alignrec.stage import exit_code

FIRST, BROKEN = (2, 6), (2, 8)


def check_installed(pyg: str, *, has_pyg_lib: bool) -> None:
    """Refuse what the loader cannot work with.

    Args:
        pyg: version of torch_geometric.
        has_pyg_lib: whether pyg-lib can be imported.

    Raises:
        UserError: another version is needed, or pyg-lib.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", pyg)[:2])
    if not FIRST <= numbers < BROKEN:
        raise UserError(
            f"torch_geometric {pyg} cannot sample across partitions: its distributed sampler works "
            f"in 2.6 and 2.7, and raises TypeError when it is made in 2.8.0 and 2.8.1. Install "
            f"torch_geometric==2.7.0 in an environment of its own; alignrec's own sampler needs "
            f"none of this."
        )
    if not has_pyg_lib:
        raise UserError(
            "pyg-lib is not installed, and PyG's distributed sampler has no other kernel. Install "
            "the wheel for your version of torch from https://data.pyg.org/whl; alignrec's own "
            "sampler does without."
        )


def open_partition(folder: Path, partition: int) -> tuple[LocalFeatureStore, LocalGraphStore]:
    """Return PyG's stores of one partition of a graph artifact, ready for its loaders.

    Two things differ from what ``from_partition`` gives. Features are asked for by the number of a
    node within its type, but listed by its number over all types. And a loader wants ``x`` for
    every type of node, so users get their degree; weights of edges are left out.
    """
    graph = LocalGraphStore.from_partition(str(folder), partition)
    features = LocalFeatureStore.from_partition(str(folder), partition)
    offsets = dict(zip(NODE_TYPES, read_meta(folder)["node_offset"], strict=True))
    for node_type in NODE_TYPES:
        ids = features.get_global_id(node_type) - offsets[node_type]
        if len(ids):
            features.put_global_id(ids, node_type)
    degree = features.get_tensor(group_name=USER, attr_name="degree")
    features.put_tensor(degree.float().unsqueeze(1), group_name=USER, attr_name="x")
    for edge_type in EDGE_TYPES:
        features.remove_tensor(group_name=edge_type, attr_name="edge_attr")
    return features, graph


def sample(options: argparse.Namespace) -> None:
    """Sample some batches of this rank's users and say how large they are."""
    artifacts.read(options.graph, "graph")
    has_pyg_lib = importlib.util.find_spec("pyg_lib") is not None
    check_installed(torch_geometric.__version__, has_pyg_lib=has_pyg_lib)
    from torch_geometric.distributed import DistContext, DistNeighborLoader

    with process_group(backend="gloo") as rank:  # what is sampled lies in host memory
        num_partitions = read_meta(options.graph)["num_parts"]
        if rank.world_size != num_partitions:
            raise UserError(
                f"{options.graph} has {num_partitions} partitions, but {rank.world_size} ranks "
                f"were started: PyG gives each rank one. Start as many with torchrun "
                f"--nproc-per-node {num_partitions}."
            )
        features, graph = open_partition(options.graph, rank.index)
        users = features.get_global_id(USER)
        size = torch.tensor([len(users)])
        if rank.world_size > 1:
            dist.all_reduce(size, dist.ReduceOp.MIN)  # unequal numbers of batches would hang
        context = DistContext(rank.index, rank.index, rank.world_size, rank.world_size, "alignrec")
        loader = DistNeighborLoader(
            data=(features, graph),
            num_neighbors={RATES: [10, 10], REV_RATES: [10, 10], SIMILAR: [0, 0]},
            input_nodes=(USER, users[: int(size)]),
            batch_size=options.batch_size,
            master_addr=os.environ.get("MASTER_ADDR", "127.0.0.1"),
            master_port=int(os.environ.get("MASTER_PORT", "29500")) + 1,
            current_ctx=context,
            async_sampling=False,
            device=torch.device("cpu"),
        )
        start, seeds = time.monotonic(), 0
        for batch in itertools.islice(loader, options.batches):
            seeds += batch[USER].batch_size
            nodes = {node_type: batch[node_type].num_nodes for node_type in (USER, ITEM)}
            print(f"rank {rank.index}: {batch[USER].batch_size} seeds, nodes {nodes}", flush=True)
        rate = seeds / (time.monotonic() - start)
        print(f"rank {rank.index}: {rate:,.0f} seeds/s", flush=True)


def main() -> int:
    """Run the example; 2 and one line where it cannot run here."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("graph", type=Path, help="folder of a graph artifact")
    parser.add_argument("--batches", type=int, default=5, help="batches of each rank")
    parser.add_argument("--batch-size", type=int, default=512, help="users in a batch")
    options = parser.parse_args()
    return exit_code(lambda: sample(options))


if __name__ == "__main__":
    sys.exit(main())
