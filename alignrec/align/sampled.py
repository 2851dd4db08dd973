"""Sampled mode: any number of ranks, each with its share of the graph and of the embeddings.

A step reads sampled neighbourhoods of this rank's triples, asks the owners for the ID embeddings
of the nodes in them, and sends the gradients back. The content gate is on every rank. Everything is
computed on the CPU, where the tables and the sampler's batches are.
"""

import contextlib
import functools
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch_geometric.data import HeteroData

from alignrec import checkpoint
from alignrec.align import row_file
from alignrec.align.batches import Triples
from alignrec.align.config import AlignConfig
from alignrec.align.dense_adam import ADAM, DenseAdam, below
from alignrec.align.inference import Inference
from alignrec.align.initial import TRAINED, Earlier, take_over, trained_rows
from alignrec.align.inputs import Inputs
from alignrec.align.losses import gram_square, unit_rows
from alignrec.align.model import ITEM_TABLE, USER_TABLE, ContentGate, initial_rows
from alignrec.align.objective import Terms, objective
from alignrec.align.peers import Alone, Peers, Ranks
from alignrec.align.sampled_propagation import represent
from alignrec.align.schedule import learning_rate
from alignrec.align.sharded_embedding import Lookup, ShardedEmbedding
from alignrec.align.validation import Choice, Validation, metrics_from
from alignrec.artifacts import Draft
from alignrec.checkpoint import Checkpoint
from alignrec.data.csr import CSR
from alignrec.distributed.exchange import Exchange, gather_rows
from alignrec.distributed.process_group import Rank, barrier, new_group
from alignrec.distributed.watchdog import Beat, unwatched
from alignrec.graph.loader import TripleLoader, TripleSettings, prefetch
from alignrec.graph.schema import ITEM, RATES, REV_RATES, USER, NodeType
from alignrec.graph.stores import PartitionedGraph

_PREFETCH_BATCHES = 2
_TABLES = {USER: USER_TABLE, ITEM: ITEM_TABLE}


class SampledTrainer:
    """Sharded embeddings and a replicated gate (a ``Trainer`` of ``alignrec.align.training``)."""

    def __init__(
        self,
        config: AlignConfig,
        inputs: Inputs,
        rank: Rank,
        *,
        work: Path,
        earlier: Earlier | None = None,
        beat: Beat = unwatched,
        alive: Beat = unwatched,
    ) -> None:
        self._config = config
        self._rank = rank
        self._graph = PartitionedGraph.open(inputs.graph, rank)
        self._exchange = Exchange(rank, before_collective=beat)
        self._peers: Peers = Ranks(rank, self._exchange) if rank.world_size > 1 else Alone()
        self._loader = TripleLoader(
            self._graph,
            Exchange(
                rank, new_group(timeout_seconds=config.timeout_seconds), before_collective=beat
            ),
            TripleSettings(
                num_neighbors=config.neighbors,
                similar_neighbors=config.similar_neighbors,
                global_batch_size=config.batch_size,
                seed=config.seed,
                cache_bytes=config.cache_bytes,
                sample_cache_bytes=config.sample_cache_bytes,
            ),
        )
        self.num_steps = self._loader.num_steps
        self.num_triples = self._graph.num_edges[RATES]
        self.tables = {t: _make_table(t, config, self._graph, self._exchange) for t in _TABLES}
        self.gate: nn.Module = nn.Identity()
        if config.content:
            self.gate = ContentGate(
                self._graph.num_features, config.embedding_dim, seed=config.seed
            )
        self._adam = DenseAdam(self.gate)
        self._inference = Inference(
            self._graph,
            self._exchange,
            layers=config.layers,
            content_layers=config.content_layers,
            cold_from_similar=config.cold_from_similar,
        )
        if earlier is not None:
            self._go_on(earlier)
        self._trained = trained_rows(earlier, self._graph.degree, self._graph.owned)
        self._validation = _owned_validation(
            config, self._graph, inputs, self._exchange, alive=alive
        )
        self.num_judged = self._validation.num_users
        self._item_rows = work / "items.safetensors"
        self._best_gate: dict[str, Tensor] = {}
        self._best_rows: dict[NodeType, Tensor] = {}

    def _go_on(self, earlier: Earlier) -> None:
        """Start from an earlier run's parameters; a rank reads the rows of its own nodes."""
        weights = {t: table.weight for t, table in self.tables.items()}
        pull, content = self._inference.pull, self._config.content
        take_over(earlier, weights, self._graph.owned, pull, content=content)
        if earlier.gate is not None:
            self.gate.load_state_dict(earlier.gate)

    def steps(self, epoch: int, first_step: int) -> Iterator[Terms]:
        """See ``Trainer``."""
        rate = learning_rate(self._config, epoch)
        batches = prefetch(
            self._loader.epoch(epoch, first_step=first_step),
            depth=_PREFETCH_BATCHES,
            traffic=self._loader.traffic,
        )
        with contextlib.closing(batches):  # type: ignore[type-var]
            for batch in batches:
                yield self._step(batch, rate) if batch.num_triples else {}

    def _step(self, batch: HeteroData, rate: float) -> Terms:
        lookups = {t: self.tables[t].lookup(batch[t].n_id) for t in _TABLES}
        nodes = represent(
            batch, {t: lookup.rows for t, lookup in lookups.items()}, self._gates(batch)
        )
        triples = Triples(
            batch[USER].src_index, batch[ITEM].dst_pos_index, batch[ITEM].dst_neg_index
        )
        loss, terms = objective(
            self._config,
            nodes,
            triples,
            self._target(batch),
            peers=self._peers,
            num_triples=batch.num_triples,
        )
        loss.backward()  # type: ignore[no-untyped-call]
        self._update(lookups, rate)
        return self._total(terms)

    def evaluate(self) -> dict[str, float]:
        """See ``Trainer``."""
        user, item = self._represent()
        shape = (self._graph.num_nodes[ITEM], self._config.embedding_dim)
        self._create(self._item_rows, {ITEM: shape})
        row_file.write_rows(
            self._item_rows, ITEM, self._graph.owned[ITEM], item, exchange=self._exchange
        )
        barrier(self._rank)
        totals = self._validation.totals(user, row_file.read(self._item_rows, ITEM))
        return metrics_from(self._exchange.sum(totals))

    def traffic(self) -> dict[str, float]:
        """See ``Trainer``."""
        return self._loader.traffic.take(self._exchange.sum)

    def keep_best(self) -> None:
        """See ``Trainer``."""
        self._best_gate = {n: v.detach().clone() for n, v in self.gate.state_dict().items()}
        self._best_rows = {t: table.weight.clone() for t, table in self.tables.items()}

    def save(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """See ``Trainer``."""
        tensors = {
            f"{t}/{name}": value
            for t, table in self.tables.items()
            for name, value in table.state().items()
        }
        tensors |= {f"best/{t}": value for t, value in self._best_rows.items()}
        if self._rank.is_first:
            tensors |= {f"gate/{n}": v for n, v in self.gate.state_dict().items()}
            tensors |= {f"best_gate/{n}": v for n, v in self._best_gate.items()}
            tensors |= self._adam.tensors()
        checkpoint.save(folder, step, tensors=tensors, state=state, rank=self._rank)

    def restore(self, saved: Checkpoint) -> dict[str, Any]:
        """See ``Trainer``; the number of ranks may be another than when it was saved."""
        mapped = saved.tensors(0, "gate/", "best_gate/", ADAM)
        # Copies: later checkpoints replace the file, and it may be another host that deletes it.
        replicated = {name: value.clone() for name, value in mapped.items()}
        self.gate.load_state_dict(below("gate/", replicated))
        self._best_gate = below("best_gate/", replicated)
        self._adam.load(replicated)
        for t, table in self.tables.items():
            self._load_table(t, table, saved)
        return saved.state(0)

    def _load_table(self, node_type: NodeType, table: ShardedEmbedding, saved: Checkpoint) -> None:
        """Take over this rank's rows from the files that have some, and read no others' rows."""
        # Ranks own consecutive partitions: where they were as many, the first one has all.
        near = self._rank.index * saved.world_size // self._rank.world_size
        left = len(table.owned)
        for index in sorted(range(saved.world_size), key=lambda index: abs(index - near)):
            ids = saved.tensors(index, f"{node_type}/ids")[f"{node_type}/ids"]
            mine, rows = table.placed(ids)
            if len(rows) or index == near:  # that one also tells whether there are best rows
                tensors = saved.tensors(index, f"{node_type}/", f"best/{node_type}")
                table.load(below(f"{node_type}/", tensors))
                best = tensors.get(f"best/{node_type}")
                if best is not None:
                    kept = self._best_rows.setdefault(node_type, torch.zeros_like(table.weight))
                    kept[rows] = best[mine]
            left -= len(rows)
            if left == 0:
                break
        assert left == 0, f"{left} {node_type} rows of rank {self._rank.index} are in no file"

    def write_best(self, draft: Draft) -> None:
        """See ``Trainer``."""
        self.gate.load_state_dict(self._best_gate)
        for t, table in self.tables.items():
            table.weight.copy_(self._best_rows[t])
        final = dict(zip(_TABLES, self._represent(), strict=True))
        self._write(draft.path / "embeddings.safetensors", final)
        weights = {t: table.weight for t, table in self.tables.items()}
        gate = {f"gate.{name}": value for name, value in self._best_gate.items()}
        path = draft.path / "model.safetensors"
        self._write(path, weights, replicated=gate, masks=self._trained)

    def _write(
        self,
        path: Path,
        tables: Mapping[NodeType, Tensor],
        *,
        replicated: Mapping[str, Tensor] = MappingProxyType({}),
        masks: Mapping[NodeType, Tensor] = MappingProxyType({}),
    ) -> None:
        """Write this rank's rows of tables and masks, and on rank 0 what all ranks have."""
        parts = [(t, t, table) for t, table in tables.items()]
        marks = [(f"{TRAINED}{t}", t, mask) for t, mask in masks.items()]
        shapes: dict[str, tuple[int, ...]] = {
            name: (self._graph.num_nodes[t], table.shape[1]) for name, t, table in parts
        }
        shapes |= {name: tuple(value.shape) for name, value in replicated.items()}
        shapes |= {name: (self._graph.num_nodes[t], 1) for name, t, _ in marks}
        self._create(path, shapes, masks=[name for name, _, _ in marks])
        for name, t, table in parts + marks:
            row_file.write_rows(path, name, self._graph.owned[t], table, exchange=self._exchange)
        if self._rank.is_first:
            for name, value in replicated.items():
                row_file.write_whole(path, name, value)
        barrier(self._rank)

    def _create(
        self, path: Path, shapes: Mapping[str, tuple[int, ...]], *, masks: Collection[str] = ()
    ) -> None:
        barrier(self._rank)  # nobody reads the previous one any more
        if self._rank.is_first:
            row_file.create(path, shapes, masks=masks)
        barrier(self._rank)

    def _represent(self) -> tuple[Tensor, Tensor]:
        gate = self.gate if self._config.content else None
        return self._inference.represent(self.tables[USER].weight, self.tables[ITEM].weight, gate)

    def _target(self, batch: HeteroData) -> "BatchTarget | None":
        if not self._config.content:
            return None
        return BatchTarget(batch[ITEM].n_id, self._graph, self._exchange, self._peers)

    def _update(self, lookups: Mapping[NodeType, Lookup], rate: float) -> None:
        for node_type, lookup in lookups.items():
            self.tables[node_type].update(lookup, learning_rate=rate)
        self._sum_gate_gradients()
        self._adam.step(rate)

    def _sum_gate_gradients(self) -> None:
        gradients = [p.grad for p in self.gate.parameters() if p.grad is not None]
        if not gradients or self._rank.world_size == 1:
            return
        flat = self._exchange.sum(torch.cat([g.ravel() for g in gradients]))
        for gradient, summed in zip(
            gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))

    def _gates(self, batch: HeteroData) -> Tensor | None:
        return self.gate(batch[ITEM].content_x) if self._config.content else None

    def _total(self, terms: Terms) -> Terms:
        """Return the terms of the whole batch."""
        shares = torch.stack([term.detach() for term in terms.values()])
        if "reg" in terms:  # every rank has it in full
            shares[list(terms).index("reg")] /= self._rank.world_size
        return dict(zip(terms, self._exchange.sum(shares), strict=True))


class BatchTarget:
    """Content features of the batch's items as REG's target (a ``Target`` of ``objective``)."""

    def __init__(
        self,
        n_id: Int64[Tensor, " nodes"],
        graph: PartitionedGraph,
        exchange: Exchange,
        peers: Peers,
    ) -> None:
        self._n_id = n_id
        self._graph = graph
        self._exchange = exchange
        self._peers = peers

    def target(self, items: Int64[Tensor, " n"]) -> Float[Tensor, "n f"]:
        """See ``Target``; collective."""
        graph = self._graph
        features = gather_rows(
            self._exchange,
            self._n_id[items],
            lambda ids: graph.owner_of(ITEM, ids),
            lambda ids: graph.features(graph.local_rows(ITEM, ids)),
        )
        return unit_rows(features.float())

    def target_square(
        self, items: Int64[Tensor, " n"], target: Float[Tensor, "n f"], count: Float[Tensor, " n"]
    ) -> Float[Tensor, ""]:
        """See ``Target``; collective."""
        del items
        if self._peers.world_size == 1:
            return gram_square(target, count)
        moment = (target * count.unsqueeze(1)).T @ target  # (f, f)
        return self._peers.sum(moment).double().square().sum()


def _make_table(
    node_type: NodeType, config: AlignConfig, graph: PartitionedGraph, exchange: Exchange
) -> ShardedEmbedding:
    owned = graph.owned[node_type]
    weight = initial_rows(
        owned,
        config.embedding_dim,
        num_rows=graph.num_nodes[node_type],
        table=_TABLES[node_type],
        seed=config.seed,
    )
    return ShardedEmbedding(
        weight,
        owned=owned,
        owner_of=functools.partial(graph.owner_of, node_type),
        local_rows=functools.partial(graph.local_rows, node_type),
        exchange=exchange,
    )


def _owned_validation(
    config: AlignConfig, graph: PartitionedGraph, inputs: Inputs, exchange: Exchange, *, alive: Beat
) -> Validation:
    """Return the validation of this rank's users; collective."""
    lists, owned = graph.neighbors[REV_RATES], graph.owned[USER]
    train = CSR(lists.indptr, lists.source.long(), inputs.num_items)
    parts = [torch.empty((2, 0), dtype=torch.int64)]
    for users, items in inputs.interaction_batches("valid"):
        mine = graph.owner_of(USER, users) == exchange.rank_index
        parts.append(torch.stack([graph.local_rows(USER, users[mine]), items[mine]]))
        alive()
    rows, columns = torch.cat(parts, dim=1)
    return Validation(
        train,
        CSR.from_pairs(rows, columns, train.num_rows, inputs.num_items),
        choice=Choice(owned, config.evaluate_users, config.seed, total=exchange.sum),
        removed=inputs.removed_items(),
        block_users=config.evaluation_block,
        alive=alive,
    )
