"""Full-graph mode: one process, every node in every step (graph -> embeddings).

All of the graph and of the embeddings is in this process's memory; PAPER.md's defaults, exactly.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int64
from safetensors.torch import save_file
from torch import Tensor, nn

from alignrec import checkpoint
from alignrec.align.batches import Triples, TripleSchedule
from alignrec.align.cold import fill_cold
from alignrec.align.config import AlignConfig
from alignrec.align.content import Content, DriftingContent, FixedContent
from alignrec.align.dense_adam import DenseAdam, below
from alignrec.align.initial import TRAINED, Earlier, take_over, trained_rows
from alignrec.align.inputs import Inputs
from alignrec.align.model import ITEM_TABLE, USER_TABLE, ContentGate, initial_rows
from alignrec.align.objective import Representations, Terms, objective
from alignrec.align.peers import Alone
from alignrec.align.propagation import SparseMatrix, normalized_rates, propagate
from alignrec.align.schedule import learning_rate
from alignrec.align.validation import Choice, Validation, metrics_from
from alignrec.artifacts import Draft
from alignrec.checkpoint import Checkpoint
from alignrec.data.csr import CSR
from alignrec.distributed.process_group import Rank
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.graph.hashing import salt
from alignrec.graph.schema import ITEM, RATES, REV_RATES, USER, EdgeType

_DROPOUT = 0x44524F50  # stream number of the edges that an epoch leaves out


class FullGraphModel(nn.Module):
    """Embeddings and content gate with the propagation over the whole graph."""

    def __init__(
        self,
        config: AlignConfig,
        rates: SparseMatrix,
        num_nodes: tuple[int, int],
        similar: SparseMatrix | None,
        features: Float[Tensor, "num_items f"] | None,
    ) -> None:
        super().__init__()
        self._layers, self._content_layers = config.layers, config.content_layers
        self.rates = rates
        self._similar = similar
        dim, seed = config.embedding_dim, config.seed
        self.user, self.item = (
            nn.Parameter(initial_rows(torch.arange(n), dim, num_rows=n, table=table, seed=seed))
            for n, table in zip(num_nodes, (USER_TABLE, ITEM_TABLE), strict=True)
        )
        self.content: Content | None = None
        if features is not None:
            self.content = (DriftingContent if config.paper_compatible else FixedContent)(features)
            self.gate = ContentGate(features.shape[1], dim, seed=seed)

    def represent(self, rates: SparseMatrix | None = None) -> Representations:
        """Propagate: H_id and, with content, H_mm of every node.

        Args:
            rates: the user-item block R~ to propagate over, or a part of it; None: all of it.
        """
        rates = self.rates if rates is None else rates
        user_id, item_id = propagate(rates, self.user, self.item, layers=self._layers)
        if self.content is None or self._similar is None:
            return Representations(user_id, item_id)
        item_content = self.item * self.gate(self.content.table())
        for _ in range(self._content_layers):
            item_content = self._similar.multiply(item_content)
        user_content = rates.multiply(item_content)
        return Representations(user_id, item_id, user_content, item_content)

    def final(self, cold: Bool[Tensor, " num_items"] | None) -> tuple[Tensor, Tensor]:
        """Return (user, item) final representations, for ranking.

        Args:
            cold: items whose H_id comes from their similar items; None: all have their own.
        """
        nodes = self.represent()
        if cold is not None and self._similar is not None:
            filled = fill_cold(nodes.item_id, cold, self._similar.multiply)
            nodes = dataclasses.replace(nodes, item_id=filled)
        return nodes.fused()

    @torch.no_grad()
    def go_on(self, earlier: Earlier) -> None:
        """Start from an earlier run's parameters."""
        drawn = {USER: self.user.data, ITEM: self.item.data}
        ids = {table: torch.arange(len(rows)) for table, rows in drawn.items()}
        take_over(earlier, drawn, ids, self._pull, content=self.content is not None)
        if earlier.gate is not None:
            self.gate.load_state_dict(earlier.gate)

    def _pull(self, edge_type: EdgeType, source: Tensor) -> Tensor:
        """Return the weighted sum over in-edges of each destination node."""
        if edge_type == REV_RATES:
            return self.rates.multiply(source)
        if edge_type == RATES:
            return self.rates.transpose.multiply(source)
        assert self._similar is not None
        return self._similar.multiply(source)


class FullGraphTrainer:
    """One optimizer over the whole model (a ``Trainer`` of ``alignrec.align.training``)."""

    def __init__(
        self,
        config: AlignConfig,
        inputs: Inputs,
        rank: Rank,
        *,
        earlier: Earlier | None = None,
        alive: Beat = unwatched,
    ) -> None:
        self._config = config
        self._rank = rank
        train = inputs.interactions("train")
        self._schedule = TripleSchedule(train, batch_size=config.batch_size, seed=config.seed)
        self.num_steps = self._schedule.num_steps
        self.num_triples = len(train.columns)
        self.model = _build_model(config, inputs, train, rank.device)
        if earlier is not None:
            self.model.go_on(earlier)
        degree = {
            USER: torch.bincount(train.rows, minlength=train.num_rows),
            ITEM: torch.bincount(train.columns, minlength=train.num_cols),
        }
        ids = {table: torch.arange(len(counts)) for table, counts in degree.items()}
        self._trained = trained_rows(earlier, degree, ids)
        self._cold = _cold_items(config, degree[ITEM], rank.device)
        self._adam = DenseAdam(self.model)
        self._validation = Validation(
            train,
            inputs.interactions("valid"),
            choice=Choice(ids[USER], config.evaluate_users, config.seed),
            removed=inputs.removed_items(),
            block_users=config.evaluation_block,
            alive=alive,
        )
        self.num_judged = self._validation.num_users
        self._best: dict[str, Tensor] = {}

    def steps(self, epoch: int, first_step: int) -> Iterator[Terms]:
        """See ``Trainer``."""
        rate = learning_rate(self._config, epoch)
        key = salt(self._config.seed, epoch, _DROPOUT)
        rates = self.model.rates.thinned(self._config.edge_dropout, key)
        for triples in self._schedule.epoch(epoch, first_step=first_step):
            yield self._step(triples.to(self._rank.device), rates, rate)

    def _step(self, triples: Triples, rates: SparseMatrix, rate: float) -> Terms:
        if not len(triples.user):
            return {}
        loss, terms = objective(
            self._config,
            self.model.represent(rates),
            triples,
            self.model.content,
            peers=Alone(),
            num_triples=len(triples.user),
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step(rate)
        return {name: term.detach() for name, term in terms.items()}

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """See ``Trainer``."""
        user, item = self.model.final(self._cold)
        return metrics_from(self._validation.totals(user, item))

    def traffic(self) -> dict[str, float]:
        """See ``Trainer``; nothing is sampled."""
        return {}

    @torch.no_grad()
    def keep_best(self) -> None:
        """See ``Trainer``."""
        self._best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def save(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """See ``Trainer``."""
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"best/{name}": value for name, value in self._best.items()}
        tensors |= self._adam.tensors()
        checkpoint.save(folder, step, tensors=tensors, state=state, rank=self._rank)

    def restore(self, saved: Checkpoint) -> dict[str, Any]:
        """See ``Trainer``."""
        tensors, state = saved.load(0)
        tensors = {name: value.to(self._rank.device) for name, value in tensors.items()}
        self.model.load_state_dict(below("model/", tensors))
        self._best = below("best/", tensors)
        self._adam.load(tensors)
        return state

    @torch.no_grad()
    def write_best(self, draft: Draft) -> None:
        """See ``Trainer``."""
        self.model.load_state_dict(self._best)
        user, item = self.model.final(self._cold)
        embeddings = {"user": user.cpu(), "item": item.cpu()}
        save_file(embeddings, draft.path / "embeddings.safetensors")
        parameters = {name: value.cpu() for name, value in self._best.items()}
        parameters |= {f"{TRAINED}{table}": mask for table, mask in self._trained.items()}
        save_file(parameters, draft.path / "model.safetensors")


def _cold_items(
    config: AlignConfig, degree: Int64[Tensor, " num_items"], device: torch.device
) -> Bool[Tensor, " num_items"] | None:
    """Return which items take H_id from their similar items; None where none does."""
    cold = degree == 0
    return cold.to(device) if config.cold_from_similar and cold.any() else None


def _build_model(
    config: AlignConfig, inputs: Inputs, train: CSR, device: torch.device
) -> FullGraphModel:
    similar = inputs.similarities().to(device) if config.content else None
    features = inputs.feature_table() if config.content else None
    rates = normalized_rates(train).to(device)
    nodes = (inputs.num_users, inputs.num_items)
    return FullGraphModel(config, rates, nodes, similar, features).to(device)
