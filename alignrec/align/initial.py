"""Parameters to start from: those of an earlier artifact of the same catalogue (-> trainers).

Rows are matched by number, since item_index and user_index stay from one version of a dataset to
the next. New items start from the items that their content resembles, new users from their items;
so do those that were numbered before, but had no training interaction yet.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from alignrec import artifacts
from alignrec.align import catalogue, row_file
from alignrec.align.config import AlignConfig
from alignrec.align.inputs import Inputs
from alignrec.artifacts import Manifest
from alignrec.configuration import digest
from alignrec.errors import UserError
from alignrec.graph.schema import ITEM, RATES, REV_RATES, SIMILAR, USER, EdgeType, NodeType

CATALOGUE = "catalogue"
CONTENT = "content"
MODEL = "model.safetensors"
GATE = "gate."
TRAINED = "trained."
HELD_OUT = "held_out"
_RANDOM_SPLITS = ("user_random",)

# (edge type, rows of source nodes) -> weighted sums over the in-edges of destination nodes.
Pull = Callable[[EdgeType, Float[Tensor, "sources d"]], Float[Tensor, "targets d"]]


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The artifact to go on from, known to fit.

    Attributes:
        path: its ``model.safetensors``.
        manifest: of the artifact.
        num_rows: users and items that it has; more have come since.
        gate: its content gate's parameters; None without content, or where features have another
            meaning by now.
    """

    path: Path
    manifest: Manifest
    num_rows: Mapping[NodeType, int]
    gate: dict[str, Tensor] | None

    @classmethod
    def open(cls, config: AlignConfig, inputs: Inputs) -> "Earlier | None":
        """Look at what the configuration names; None where training starts from nothing.

        Raises:
            UserError: it does not fit this run.
        """
        manifest, folder = config.earlier(), config.initial.embeddings
        if manifest is None or folder is None:
            return None
        path = folder / MODEL
        shapes = _shapes(path)
        if f"{TRAINED}{ITEM}" not in shapes:
            raise UserError(
                f"initial.embeddings={folder} does not tell which rows were trained, because an "
                f"older version of the align stage wrote it. Train once without initial.embeddings."
            )
        _refuse_other_models(folder, shapes, config)
        rows = {USER: shapes["user"][0], ITEM: shapes["item"][0]}
        present = {USER: inputs.num_users, ITEM: inputs.num_items}
        for table, count in rows.items():
            if count > present[table]:
                raise UserError(
                    f"initial.embeddings={folder} has {count} {table}s, the dataset "
                    f"{present[table]}: numbers only ever grow, so it is of another catalogue or "
                    f"of a later version. Name embeddings of this catalogue."
                )
        gate = None
        if config.content and _same_content(manifest, shapes, inputs):
            names = [name for name in shapes if name.startswith(GATE)]
            gate = {name.removeprefix(GATE): row_file.read(path, name).clone() for name in names}
        return cls(path, manifest, rows, gate)

    def check_catalogue(self, dataset: Path) -> None:
        """Refuse embeddings whose rows belong to other users or items (rank 0 calls it).

        Raises:
            UserError: the present tables do not begin with the keys that it was trained on.
        """
        recorded = self.manifest.facts.get(CATALOGUE)
        if recorded is None:
            raise UserError(
                f"initial.embeddings={self.path.parent} does not tell the keys of its rows, "
                f"because an older version of the align stage wrote it: rows might belong to "
                f"others. Train once without initial.embeddings."
            )
        found = catalogue.digests(dataset, {t: self.num_rows[t] for t in catalogue.TABLES})
        for table in catalogue.TABLES:
            if recorded[table] != found[table]:
                raise UserError(
                    f"initial.embeddings={self.path.parent} was trained on a catalogue whose first "
                    f"{self.num_rows[table]} {table}s have other keys than those of {dataset}: its "
                    f"rows belong to others. Name embeddings that were trained on an earlier "
                    f"version of this dataset (data_prep.versions keeps numbers), or leave "
                    f"initial.embeddings out."
                )

    def known(self, table: NodeType, ids: Int64[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Return which users or items have a row there that training interactions have reached."""
        known = ids < self.num_rows[table]
        mask = row_file.read(self.path, f"{TRAINED}{table}")[:, 0]
        return known.masked_scatter(known, mask[ids[known]].bool())

    def rows(self, table: NodeType, ids: Int64[Tensor, " n"]) -> Float[Tensor, "n d"]:
        """Return the rows of users or items that are known; only these are read from disk."""
        return row_file.read(self.path, table)[ids]

    def describe(self, inputs: Inputs) -> str:
        """Say what was taken over."""
        new = inputs.num_users - self.num_rows[USER], inputs.num_items - self.num_rows[ITEM]
        gate = "with its content gate" if self.gate else "content gate drawn anew"
        return f"goes on from {self.path.parent}, {gate}; new: {new[0]:,} users, {new[1]:,} items"

    def facts(self, inputs: Inputs) -> dict[str, object]:
        """Return what the new artifact keeps of it."""
        return {
            "embeddings": str(self.path.parent),
            "identity": self.manifest.identity,
            "new_users": inputs.num_users - self.num_rows[USER],
            "new_items": inputs.num_items - self.num_rows[ITEM],
            "gate": "kept" if self.gate else "drawn anew",
        }


def take_over(
    earlier: Earlier,
    tables: Mapping[NodeType, Float[Tensor, "rows d"]],
    ids: Mapping[NodeType, Int64[Tensor, " rows"]],
    pull: Pull,
    *,
    content: bool,
) -> None:
    """Fill the tables to start with; collective where ``pull`` is.

    An item that is not known gets the mean of the similar items that are (without content: of its
    users), such a user that of its items. Who has none of these keeps the row that was drawn.

    Args:
        earlier: where known rows come from.
        tables: this rank's rows as a run from nothing has them; overwritten.
        ids: numbers of these rows.
        pull: of the graph's weighted edges.
        content: whether there are similar items.
    """
    known = {}
    for name, table in tables.items():
        mine = earlier.known(name, ids[name])
        known[name] = mine.to(table.device)
        table[known[name]] = earlier.rows(name, ids[name][mine]).to(table.device)
    source, edges = (ITEM, SIMILAR) if content else (USER, RATES)
    item = _mean(pull, edges, tables[source], known[source])
    _put(tables[ITEM], item, ~known[ITEM])
    decided = known[ITEM] | (item[:, -1] > 0)
    _put(tables[USER], _mean(pull, REV_RATES, tables[ITEM], decided), ~known[USER])


def trained_rows(
    earlier: Earlier | None,
    degree: Mapping[NodeType, Int64[Tensor, " rows"]],
    ids: Mapping[NodeType, Int64[Tensor, " rows"]],
) -> dict[NodeType, UInt8[Tensor, "rows 1"]]:
    """Return which rows training interactions have reached, now or in an earlier run.

    Args:
        earlier: what this run went on from.
        degree: training interactions of each of this rank's nodes.
        ids: numbers of these nodes.
    """
    trained = {name: count > 0 for name, count in degree.items()}
    if earlier is not None:
        trained = {name: rows | earlier.known(name, ids[name]) for name, rows in trained.items()}
    return {name: rows.to(torch.uint8).unsqueeze(1) for name, rows in trained.items()}


def content_source(features: Path) -> str:
    """Return a digest of how features came about: where it is another, columns mean other things.

    Nothing tells how imported files came about, so there it is the features themselves that count.

    Args:
        features: folder of the artifact.
    """
    manifest = artifacts.read(features, "features")
    if manifest.config.get("files"):
        return manifest.identity
    encoder = manifest.inputs.get("encoder", {}).get("identity")
    return digest([encoder, manifest.config.get("extraction")])


def held_out_settings(dataset: Path) -> dict[str, Any]:
    """Return the settings that decide which interactions of a dataset are held out."""
    config = artifacts.read(dataset, "dataset").config
    duplicates = config.get("interactions", {}).get("duplicates")
    return {"split": config.get("split", {}), "duplicates": duplicates}


def leaks(earlier: Mapping[str, Any] | None, present: Mapping[str, Any]) -> list[str]:
    """Return why the earlier embeddings may have been trained on what is held out now.

    Args:
        earlier: the ``held_out_settings`` of the dataset that they were trained on.
        present: those of this run's dataset.
    """
    both = [settings for settings in (earlier, present) if settings is not None]
    reasons = []
    if any(settings["split"].get("strategy") in _RANDOM_SPLITS for settings in both):
        reasons.append("a dataset was split at random (split by time)")
    if earlier is None or earlier["split"] != present["split"]:
        reasons.append("data_prep.split has changed (keep it)")
    if any(settings["duplicates"] == "last" for settings in both):
        reasons.append(
            "a repeated interaction counts at its latest time, so it may move into what is held "
            "out (set data_prep.interactions.duplicates: first)"
        )
    return reasons


def _same_content(manifest: Manifest, shapes: Mapping[str, list[int]], inputs: Inputs) -> bool:
    """Say whether the gate of an earlier artifact can read the present features."""
    if manifest.config.get("paper_compatible"):  # its gate reads the table that it trained
        return False
    if manifest.facts.get(CONTENT) != content_source(inputs.features):
        return False
    dim = artifacts.read(inputs.features, "features").counts["dim"]
    return shapes[f"{GATE}project.weight"][1] == dim


def _mean(
    pull: Pull, edges: EdgeType, source: Float[Tensor, "sources d"], known: Bool[Tensor, " sources"]
) -> Float[Tensor, "targets d_plus_one"]:
    """Return the weighted mean over known neighbours, and in the last column their weight."""
    weight = known.to(source).unsqueeze(1)
    total = pull(edges, torch.cat([source * weight, weight], dim=1))
    total[:, :-1] /= total[:, -1:].clamp(min=torch.finfo(total.dtype).tiny)
    return total


def _put(table: Float[Tensor, "n d"], mean: Tensor, new: Bool[Tensor, " n"]) -> None:
    """Write the means into the rows of new ones that have one."""
    chosen = new & (mean[:, -1] > 0)
    table[chosen] = mean[chosen, :-1]


def _shapes(path: Path) -> dict[str, list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be read ({error}), so training cannot go on from it. Name other "
            f"embeddings or leave initial.embeddings out."
        ) from error


def _refuse_other_models(
    folder: Path, shapes: Mapping[str, list[int]], config: AlignConfig
) -> None:
    with_content = any(name.startswith(GATE) for name in shapes)
    if with_content != config.content:
        words = ("without", "with") if config.content else ("with", "without")
        raise UserError(
            f"initial.embeddings={folder} was trained {words[0]} content, this run is {words[1]} "
            f"it: their ID embeddings mean different things. Name embeddings that were trained "
            f"{words[1]} content, or set initial.embeddings to null."
        )
    dim = shapes["item"][1]
    if dim != config.embedding_dim:
        raise UserError(
            f"initial.embeddings={folder} has {dim} numbers a row, but "
            f"embedding_dim={config.embedding_dim}: rows cannot be taken over. Set embedding_dim: "
            f"{dim}, or leave initial.embeddings out."
        )
