"""Seconds an epoch, and to a validation recall, of full-graph alignment and of two formulas.

    python benchmarks/bench_align.py
    python benchmarks/bench_align.py --recall 0.08 0.085 0.09 0.095
    python benchmarks/bench_align.py --negatives

* ours: ``alignrec.align`` in full-graph mode, the defaults of the method; with ``--recall`` also
  with dropped edges, as in recipe ``mmrec``.
* lightgcn: LightGCN (He et al. 2020) as frameworks write it: COO adjacency over all nodes,
  ``torch.sparse.mm``, dense Adam.
* literal: the method's formulas as written: COO products, B x B similarities from the raw features
  of the batch, repeated users and items, a trainable feature table, dense Adam.

All three train on the same triples, which the same sampler draws, and rank with the same code, so
the ratios are of the steps alone. Epochs alternate within each round: what else the machine does
meets all of them. ``--negatives`` times one epoch's negatives against the loop over rows that
frameworks have in their data loaders.
"""

import argparse
import dataclasses
import itertools
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, ROOT, write_result
from torch import Tensor, nn
from torch.nn import functional

from alignrec.align.batches import Triples, TripleSchedule
from alignrec.align.config import AlignConfig
from alignrec.align.full_graph import FullGraphTrainer
from alignrec.align.inputs import Inputs
from alignrec.align.propagation import SparseMatrix, normalized_rates
from alignrec.align.schedule import learning_rate
from alignrec.align.validation import SELECTION_METRIC, Choice, Validation, metrics_from
from alignrec.distributed.process_group import process_group
from alignrec.graph.negatives import Positives, draw_negatives

LAYERS, DIM, TEMPERATURE = 2, 64, 0.2
EDGE_DROPOUT = 0.6  # of recipe mmrec


def coo(matrix: SparseMatrix, num_columns: int) -> Tensor:
    """Return the matrix as a coalesced COO tensor."""
    rows = matrix.by_rows
    lengths = rows.offsets.diff().long()
    row = torch.arange(len(lengths)).repeat_interleave(lengths)
    index = torch.stack([row, rows.columns.long()])
    return torch.sparse_coo_tensor(index, rows.values, (len(lengths), num_columns)).coalesce()


def both_ways(rates: Tensor) -> Tensor:
    """Return the symmetric adjacency over users and then items of a user-item block."""
    users, items = rates.shape
    user, item = rates.indices()
    index = torch.cat([torch.stack([user, item + users]), torch.stack([item + users, user])], 1)
    values = torch.cat([rates.values(), rates.values()])
    return torch.sparse_coo_tensor(index, values, (users + items, users + items)).coalesce()


class LightGCN(nn.Module):
    """ID embeddings, two propagations, BPR and squared norms."""

    def __init__(self, inputs: Inputs, rates: Tensor) -> None:
        super().__init__()
        self.user = nn.Embedding(inputs.num_users, DIM)
        self.item = nn.Embedding(inputs.num_items, DIM)
        for table in (self.user, self.item):
            nn.init.xavier_uniform_(table.weight)
        self.adjacency = both_ways(rates)

    def propagate(self) -> tuple[Tensor, Tensor]:
        layer = torch.cat([self.user.weight, self.item.weight])
        layers = [layer]
        for _ in range(LAYERS):
            layer = torch.sparse.mm(self.adjacency, layer)
            layers.append(layer)
        mean = torch.stack(layers, dim=1).mean(dim=1)
        user, item = torch.split(mean, [self.user.num_embeddings, self.item.num_embeddings])
        return user, item

    def represent(self) -> tuple[Tensor, Tensor]:
        return self.propagate()

    def loss(self, triples: Triples) -> Tensor:
        user, item = self.propagate()
        u, p, n = user[triples.user], item[triples.positive], item[triples.negative]
        bpr = -functional.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        rows = (
            self.user(triples.user), self.item(triples.positive), self.item(triples.negative)
        )  # fmt: skip
        return bpr + 1e-4 * sum(row.square().sum() for row in rows) / 2 / len(u)


class Literal(LightGCN):
    """The second stage of AlignRec as its formulas are written."""

    def __init__(self, inputs: Inputs, rates: Tensor, config: AlignConfig) -> None:
        super().__init__(inputs, rates)
        self.config = config
        features = inputs.feature_table()
        self.features = nn.Embedding.from_pretrained(features, freeze=False)
        self.gate = nn.Sequential(nn.Linear(features.shape[1], DIM), nn.Linear(DIM, DIM))
        self.rates = rates
        self.similar = coo(inputs.similarities(), inputs.num_items)

    def content(self) -> tuple[Tensor, Tensor]:
        gated = self.item.weight * self.gate(self.features.weight).sigmoid()
        item = torch.sparse.mm(self.similar, gated)
        return torch.sparse.mm(self.rates, item), item

    def represent(self) -> tuple[Tensor, Tensor]:
        (user_id, item_id), (user_mm, item_mm) = self.propagate(), self.content()
        return user_id + user_mm, item_id + item_mm

    def loss(self, triples: Triples) -> Tensor:
        config = self.config
        (user_id, item_id), (user_mm, item_mm) = self.propagate(), self.content()
        user, item = user_id + user_mm, item_id + item_mm
        u, p, n = user[triples.user], item[triples.positive], item[triples.negative]
        bpr = -functional.logsigmoid((u * p).sum(1) - (u * n).sum(1)).mean()
        uia = (1 - functional.cosine_similarity(u, p, dim=-1)).mean()
        l2 = sum(row.square().sum() for row in (u, p, n)) / 2 / len(u)
        cca = nce(item_mm[triples.positive], item_id[triples.positive])
        cca = cca + nce(user_mm[triples.user], user_id[triples.user])
        raw = functional.normalize(self.features.weight.detach()[triples.positive], dim=1)
        h = item_mm[triples.positive]
        reg = torch.norm(h @ h.T - raw @ raw.T) / len(u)
        return (
            bpr
            + config.uia_weight * uia
            + config.l2_weight * l2
            + config.cca_weight * cca
            + config.reg_weight * reg
        )


def nce(view: Tensor, other: Tensor) -> Tensor:
    """Return InfoNCE over all B x B pairs of a batch."""
    view, other = functional.normalize(view, dim=1), functional.normalize(other, dim=1)
    positive = ((view * other).sum(dim=-1) / TEMPERATURE).exp()
    everything = (view @ other.T / TEMPERATURE).exp().sum(dim=1)
    return -(positive / everything).log().mean()


class Plain:
    """Trains one of the formulas above on the steps that ours takes."""

    def __init__(self, model: LightGCN, config: AlignConfig, inputs: Inputs) -> None:
        train = inputs.interactions("train")
        self._model = model
        self._config = config
        self._adam = torch.optim.Adam(model.parameters(), lr=config.learning_rate)
        self._schedule = TripleSchedule(train, batch_size=config.batch_size, seed=config.seed)
        self._validation = Validation(
            train,
            inputs.interactions("valid"),
            choice=Choice(torch.arange(train.num_rows)),
            removed=inputs.removed_items(),
            block_users=config.evaluation_block,
        )

    def epoch(self, epoch: int) -> None:
        for group in self._adam.param_groups:
            group["lr"] = learning_rate(self._config, epoch)
        for triples in self._schedule.epoch(epoch):
            self._adam.zero_grad()
            loss = self._model.loss(triples)
            loss.backward()
            self._adam.step()
            float(loss)  # as trainers do, to log it

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        user, item = self._model.represent()
        return metrics_from(self._validation.totals(user, item))


class Ours:
    """Trains by the full-graph mode of the align stage."""

    def __init__(self, trainer: FullGraphTrainer) -> None:
        self._trainer = trainer

    def epoch(self, epoch: int) -> None:
        for terms in self._trainer.steps(epoch, 0):
            for term in terms.values():
                float(term)

    def evaluate(self) -> dict[str, float]:
        return self._trainer.evaluate()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def compare_epochs(models: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Time one epoch of each model in each round, after one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for epoch in range(rounds + 1):
        for name, model in models.items():
            took, _ = timed(lambda m=model, e=epoch: m.epoch(e))
            if epoch:
                seconds[name].append(took)
                print(f"round {epoch} {name}: {took:.2f} s", flush=True)
    ratios = {
        name: sorted(a / b for a, b in zip(seconds["ours"], seconds[name], strict=True))
        for name in models
        if name != "ours"
    }
    return {
        "seconds_per_epoch": {
            name: {"median": round(statistics.median(took), 3), "all": [round(t, 3) for t in took]}
            for name, took in seconds.items()
        },
        "ours_over": {
            name: {"median": round(statistics.median(found), 3), "min": round(found[0], 3),
                   "max": round(found[-1], 3)}
            for name, found in ratios.items()
        },
    }  # fmt: skip


def time_to_recall(
    models: dict[str, Any], levels: list[float], seconds_each: float
) -> dict[str, dict[str, Any]]:
    """Train each model until validation reaches all levels, or its time is over.

    Evaluations count as time.

    An epoch of each in turn, so what else the machine does meets all of them.
    """
    seconds = dict.fromkeys(models, 0.0)
    result: dict[str, dict[str, Any]] = {
        name: {"best": 0.0, "best_epoch": 0, "reached": {}} for name in models
    }
    running = dict(models)
    for epoch in itertools.count():
        if not running:
            break
        for name, model in list(running.items()):
            took, _ = timed(lambda m=model, e=epoch: m.epoch(e))
            judged, metrics = timed(model.evaluate)
            seconds[name] += took + judged
            found, recall = result[name], metrics[SELECTION_METRIC]
            print(f"{name} epoch {epoch}: {recall:.4f} {seconds[name]:.1f} s", flush=True)
            found |= {"epochs": epoch + 1, "seconds": round(seconds[name], 1)}
            if recall > found["best"]:
                found |= {"best": round(recall, 4), "best_epoch": epoch}
            for level in levels:
                if recall >= level and str(level) not in found["reached"]:
                    found["reached"][str(level)] = {
                        "epoch": epoch, "seconds": round(seconds[name], 1)
                    }  # fmt: skip
            if recall >= max(levels) or seconds[name] >= seconds_each:
                del running[name]
    return {f"time_to_valid_{SELECTION_METRIC}": result}


def compare_negatives(inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Time the negatives of an epoch: by array arithmetic, and row by row."""
    train = inputs.interactions("train")
    user, item = train.rows, train.columns
    positives = Positives.indexed(train.row_offsets, item, inputs.num_items)
    candidates = torch.unique(item)
    history: dict[int, set[int]] = {}
    for u, i in zip(user.tolist(), item.tolist(), strict=True):
        history.setdefault(u, set()).add(i)
    pool = candidates.tolist()

    def by_arrays(epoch: int) -> Tensor:
        return draw_negatives(
            user,
            item,
            rows=user,
            positives=positives,
            candidates=candidates,
            seed=0,
            epoch=epoch,
        ).squeeze(1)

    def by_rows(draw: Callable[[], int]) -> list[int]:
        result = []
        for u in user.tolist():
            drawn = draw()
            while drawn in history[u]:
                drawn = draw()
            result.append(drawn)
        return result

    loops = {
        "sample": lambda: random.sample(pool, 1)[0],  # as MMRec's loader has it
        "choice": lambda: random.choice(pool),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ("arrays", *loops)}
    hits = 0
    for epoch in range(rounds):
        took, found = timed(lambda e=epoch: by_arrays(e))
        hits += int(positives.contains(user, found).sum())
        seconds["arrays"].append(took)
        for name, draw in loops.items():
            seconds[name].append(timed(lambda d=draw: by_rows(d))[0])
    times_faster = {
        name: statistics.median(a / b for a, b in zip(took, seconds["arrays"], strict=True))
        for name, took in seconds.items()
        if name != "arrays"
    }
    return {
        "negatives": len(user),
        "seconds": {name: round(statistics.median(took), 4) for name, took in seconds.items()},
        "times_faster": {name: round(ratio, 1) for name, ratio in times_faster.items()},
        "positives_drawn": hits,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="run directory; default: recipe mmrec until graph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--recall", type=float, nargs="+", help="time to these validation recalls instead"
    )
    parser.add_argument("--seconds", type=float, default=600, help="of a model with --recall")
    parser.add_argument("--negatives", action="store_true", help="time the negatives instead")
    parser.add_argument("--output", type=Path, help="default: results/align_<part>.json")
    options = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as spare:
        run_dir = options.run or prepared(Path(spare))
        folders = {"dataset": "data_prep", "features": "features", "graph": "graph"}
        inputs = Inputs.open({kind: run_dir / name for kind, name in folders.items()})
        part, found = measure(options, inputs)
        found["graph"] = {
            "users": inputs.num_users,
            "items": inputs.num_items,
            "train": len(inputs.interactions("train").columns),
            "features": inputs.feature_table().shape[1],
        }
    found["threads"] = torch.get_num_threads()
    write_result(options.output or RESULTS / f"align_{part}.json", vars(options), found)


def prepared(folder: Path) -> Path:
    """Prepare the benchmark's data, features and graph."""
    command = ["-m", "launch", "run", "mmrec", "--until", "graph", "--run-dir", str(folder)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
    return folder


def measure(options: argparse.Namespace, inputs: Inputs) -> tuple[str, dict[str, Any]]:
    """Measure what the options ask for; return its name and the result."""
    if options.negatives:
        return "negatives", compare_negatives(inputs, options.rounds)
    config = AlignConfig()
    with process_group() as rank:
        rates = coo(normalized_rates(inputs.interactions("train")), inputs.num_items)
        models = {
            "ours": Ours(FullGraphTrainer(config, inputs, rank)),
            "lightgcn": Plain(LightGCN(inputs, rates), config, inputs),
            "literal": Plain(Literal(inputs, rates, config), config, inputs),
        }
        if options.recall is None:
            return "epochs", compare_epochs(models, options.rounds)
        dropping = dataclasses.replace(config, edge_dropout=EDGE_DROPOUT)
        models["ours_edge_dropout"] = Ours(FullGraphTrainer(dropping, inputs, rank))
        return "recall", time_to_recall(models, options.recall, options.seconds)


if __name__ == "__main__":
    main()
