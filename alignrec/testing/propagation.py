"""AlignRec's propagation written out twice: densely over the whole graph, and over one batch.

The dense one is the formulas and nothing else, in float64; batches must agree with it.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64, Int64
from torch import Tensor
from torch_geometric.data import HeteroData

from alignrec.data.schema import read_interactions
from alignrec.graph import schema
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Random embeddings, and one matrix in place of the content network."""

    user: Float64[Tensor, "num_users dim"]
    item: Float64[Tensor, "num_items dim"]
    content: Float64[Tensor, "num_features dim"]


@dataclasses.dataclass(frozen=True)
class Representations:
    """h_id and h_mm of users and items."""

    user_id: Float64[Tensor, "users dim"]
    item_id: Float64[Tensor, "items dim"]
    user_mm: Float64[Tensor, "users dim"]
    item_mm: Float64[Tensor, "items dim"]


def random_parameters(
    num_users: int, num_items: int, num_features: int, *, dim: int = 4, seed: int = 0
) -> Parameters:
    """Draw parameters; equal arguments give equal ones on every rank."""
    generator = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=generator, dtype=torch.float64)

    return Parameters(draw(num_users), draw(num_items), draw(num_features) * 0.1)


def dense_propagation(
    parameters: Parameters,
    *,
    dataset: Path,
    features: Path,
    graph: Path,
    num_layers: int,
    content_layers: int = 1,
) -> Representations:
    """Propagate over the whole graph with dense matrices."""
    num_users, num_items = len(parameters.user), len(parameters.item)
    users, items = read_interactions(dataset, "train")
    ratings = torch.zeros(num_users, num_items, dtype=torch.float64)
    ratings[torch.tensor(users), torch.tensor(items)] = 1
    adjacency = torch.zeros(num_users + num_items, num_users + num_items, dtype=torch.float64)
    adjacency[:num_users, num_users:] = ratings
    adjacency[num_users:, :num_users] = ratings.T
    degree = adjacency.sum(1)
    scale = torch.where(degree > 0, degree.clamp_min(1) ** -0.5, 0.0)
    adjacency = scale[:, None] * adjacency * scale
    layer = torch.cat([parameters.user, parameters.item])
    total = layer
    for _ in range(num_layers):
        layer = adjacency @ layer
        total = total + layer
    user_id, item_id = torch.split(total / (num_layers + 1), [num_users, num_items])
    rows = torch.tensor(np.load(features / "features.npy"), dtype=torch.float64)
    item_mm = parameters.item * torch.sigmoid(rows @ parameters.content)
    similar = dense_similarity(graph, num_items)
    for _ in range(content_layers):
        item_mm = similar @ item_mm
    user_mm = adjacency[:num_users, num_users:] @ item_mm
    return Representations(user_id, item_id, user_mm, item_mm)


def dense_similarity(graph: Path, num_items: int) -> Float64[Tensor, "num_items num_items"]:
    """Return the item-item matrix of a graph artifact."""
    result = torch.zeros(num_items, num_items, dtype=torch.float64)
    with np.load(schema.similar_path(graph)) as file:
        rows = np.repeat(np.arange(num_items), np.diff(file["indptr"]))
        columns = file["indices"].astype(np.int64)
        result[torch.tensor(rows), torch.tensor(columns)] = torch.tensor(file["values"]).double()
    return result


def batch_propagation(batch: HeteroData, parameters: Parameters) -> Representations:
    """Propagate over a batch; rows are the batch's nodes, and only those of seeds are meant."""
    id_user, id_item = parameters.user[batch[USER].n_id], parameters.item[batch[ITEM].n_id]
    num_layers = len(batch[RATES].num_sampled_edges)
    user, item = id_user, id_item
    for hop in reversed(range(num_layers)):
        user, item = (
            id_user + pull(batch, REV_RATES, hop, item),
            id_item + pull(batch, RATES, hop, user),
        )
    item_mm = torch.zeros_like(id_item)
    content = batch[ITEM].content_index
    gate = torch.sigmoid(batch[ITEM].content_x.double() @ parameters.content)
    item_mm[content] = id_item[content] * gate
    for layer in reversed(range(len(batch[SIMILAR].num_sampled_edges))):
        item_mm = pull(batch, SIMILAR, layer, item_mm)
    user_mm = pull(batch, REV_RATES, 0, item_mm)
    return Representations(user / (num_layers + 1), item / (num_layers + 1), user_mm, item_mm)


def pull(
    batch: HeteroData, edge_type: EdgeType, hop: int, values: Float64[Tensor, "sources dim"]
) -> Float64[Tensor, "targets dim"]:
    """Sum the weighted values of the sources of one hop's edges into their destinations."""
    counts = batch[edge_type].num_sampled_edges
    edges = slice(sum(counts[:hop]), sum(counts[: hop + 1]))
    source: Int64[Tensor, " edges"]
    source, target = batch[edge_type].edge_index[:, edges]
    weight = batch[edge_type].weight[edges].double()
    result = values.new_zeros(len(batch[edge_type[2]].n_id), values.shape[1])
    return result.index_add_(0, target, values[source] * weight[:, None])
