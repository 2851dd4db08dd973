"""The evaluation stage: dataset + embeddings (+ features, ablation, encoder) -> metrics, report."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from jaxtyping import Float64, Int64
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignrec import artifacts, configuration
from alignrec.data import schema
from alignrec.data.csr import CSR
from alignrec.data.embeddings import check_same_dataset, read_embeddings, read_features
from alignrec.data.interactions import read_csr
from alignrec.distributed.process_group import rank_from_environment
from alignrec.errors import UserError
from alignrec.evaluation import baselines, comparison, metrics, report, showcase
from alignrec.evaluation.config import EvaluationConfig
from alignrec.evaluation.ranking import NO_ITEM, ScoreFunction, inner_product, rank_blocks
from alignrec.stage import Context
from alignrec.telemetry import Telemetry

SplitMetrics = dict[str, dict[str, float]]  # split -> "recall@20" -> number
METRICS = "metrics.json"
REPORT = Path("report") / "index.html"


@dataclasses.dataclass(frozen=True)
class Task:
    """What every model is asked.

    Attributes:
        train: training items of each user; never recommended again.
        held_out: split ("valid", "test", "test_cold") -> held-out items of each user; the last has
            only the items without any training interaction.
        removed: items that the present catalogue does not have; nobody's candidates.
        users: split -> user_index of those who count in it; a split without users is left out.
    """

    train: CSR
    held_out: dict[str, CSR]
    removed: Int64[Tensor, " num_removed"]
    users: dict[str, Int64[Tensor, " num_users"]]

    @property
    def headline_split(self) -> str:
        """The split whose margins are told: test, or valid where there is no test."""
        return "test" if "test" in self.users else "valid"


@dataclasses.dataclass(frozen=True)
class Measured:
    """One model's metrics, and the headline's recall of each user of the headline split."""

    metrics: SplitMetrics
    by_user: Float64[Tensor, " num_users"]


def run(config: EvaluationConfig, context: Context) -> None:
    """Evaluate every model that the inputs allow and write metrics.json and the report.

    One rank does the work; others return at once.
    """
    rank = rank_from_environment()
    if not rank.is_first:
        return
    for name in ("embeddings", "ablation", "features"):
        if name in context.inputs:
            check_same_dataset(context.inputs[name], context.inputs["dataset"])
    task = read_task(context.inputs["dataset"])
    with Telemetry(context.log_dir, "evaluation") as telemetry:
        telemetry.rewind(0)
        with artifacts.writing(
            context.output,
            kind="metrics",
            fingerprint=context.fingerprint,
            config=configuration.to_mapping(config),
            inputs=context.inputs,
        ) as draft:
            builders = models(context.inputs, task.train, config, rank.device)
            measured = {
                name: _evaluate(name, build, task, config, draft.work, telemetry)
                for name, build in builders.items()
            }
            results = {name: result.metrics for name, result in measured.items()}
            margins = comparison.margins({n: result.by_user for n, result in measured.items()})
            artifacts.write_json(draft.path / METRICS, results)
            draft.counts |= _counts(task, results)
            draft.facts["margins"] = {n: dataclasses.asdict(m) for n, m in margins.items()}
            outcome = report.Outcome(results, margins, task.headline_split, config.headline_k)
            shown = _show_users(task, config, context)
            run = context.output.resolve().parent.name
            page = report.Page(outcome, shown, draft.counts, context.inputs, run)
            report.write(draft.path / REPORT, page)
        for line in summary_lines(outcome, context.output / REPORT):
            telemetry.say(line)


def read_task(dataset: Path) -> Task:
    """Read the splits of a dataset; users without training items are dropped from the others.

    Raises:
        UserError: no user has both training and held-out items, or a held-out item is removed.
    """
    counts = artifacts.read(dataset, "dataset").counts
    train, valid, test = (
        read_csr(dataset, split, num_users=counts["num_users"], num_items=counts["num_items"])
        for split in schema.SPLITS
    )
    removed = torch.from_numpy(schema.read_removed_items(dataset))
    _refuse_removed(dataset, {"valid": valid, "test": test}, removed)
    cold = test.keep_columns(_item_counts(train) == 0)
    held_out = {"valid": valid, "test": test, "test_cold": cold}
    users = {split: metrics.evaluation_users(train, rows) for split, rows in held_out.items()}
    filled = [split for split in held_out if users[split].numel()]
    if not filled:
        raise UserError(
            f"{dataset}: no user has both training and held-out interactions, so nothing can be "
            f"measured. Prepare the data from a larger log or with larger held-out splits."
        )
    return Task(train, {s: held_out[s] for s in filled}, removed, {s: users[s] for s in filled})


def _refuse_removed(
    dataset: Path, held_out: Mapping[schema.Split, CSR], removed: Int64[Tensor, " num_removed"]
) -> None:
    """Refuse held-out items that can never be ranked: every model's recall would be understated."""
    for split, rows in held_out.items():
        if bad := int(torch.isin(rows.columns, removed).sum()):
            raise UserError(
                f"{bad} of {rows.columns.numel()} interactions of "
                f"{schema.interactions_path(dataset, split)} are with removed items, which are "
                f"never ranked: recall would be understated. Run data_prep again."
            )


def models(
    inputs: Mapping[str, Path], train: CSR, config: EvaluationConfig, device: torch.device
) -> dict[str, Callable[[], ScoreFunction]]:
    """Return what builds each model that the inputs allow, in the order of the tables.

    They are built one at a time, so that only one is in memory.
    """

    def trained(kind: str) -> ScoreFunction:
        tables = read_embeddings(inputs[kind], num_users=train.num_rows, num_items=train.num_cols)
        return inner_product(*(table.to(device) for table in tables))

    def features() -> Tensor:
        return read_features(inputs["features"], num_items=train.num_cols)

    def item_cf() -> ScoreFunction:
        similar = baselines.shrunk_neighbors(
            features(),
            k=config.item_cf.neighbors,
            shrink=config.item_cf.shrink,
            block_items=config.block_items,
        )
        return baselines.item_cf(train, similar)

    result: dict[str, Callable[[], ScoreFunction]] = {"alignrec": lambda: trained("embeddings")}
    if "ablation" in inputs:
        result["ablation"] = lambda: trained("ablation")
    result["popularity"] = lambda: baselines.popularity(train)
    if "features" in inputs:
        result["zero_shot"] = lambda: baselines.zero_shot(train, features())
        result["item_cf"] = item_cf
    return result


def _evaluate(
    name: str,
    build: Callable[[], ScoreFunction],
    task: Task,
    config: EvaluationConfig,
    work: Path,
    telemetry: Telemetry,
) -> Measured:
    """Return the metrics of one model, from ``work`` where a killed run has finished it."""
    table, finished = work / f"{name}.safetensors", work / f"{name}.json"
    if finished.exists():
        result = Measured(json.loads(finished.read_text()), load_file(table)["by_user"])
        telemetry.say(f"{name}: metrics of the interrupted run kept")
    else:
        result = _measure(name, build(), task, config, telemetry)
        save_file({"by_user": result.by_user}, table)
        artifacts.write_json(finished, result.metrics)
    for split, values in result.metrics.items():
        telemetry.log({f"{name}/{split}/{k}": v for k, v in values.items()}, step=0)
    return result


def _measure(
    name: str, scores: ScoreFunction, task: Task, config: EvaluationConfig, telemetry: Telemetry
) -> Measured:
    users = torch.unique(torch.cat(list(task.users.values())))
    topk = torch.full((users.numel(), max(config.ks)), NO_ITEM)
    done = 0
    with telemetry.progress(users.numel(), "users") as bar:
        for block, items, _ in rank_blocks(
            scores,
            users=users,
            seen=task.train,
            removed=task.removed,
            k=max(config.ks),
            block_users=config.block_users,
        ):
            topk[done : done + block.numel()] = items.cpu()
            done += block.numel()
            bar.update(block.numel(), note=name)
    lists = {split: topk[torch.searchsorted(users, own)] for split, own in task.users.items()}
    truth = {split: task.held_out[split].select(own) for split, own in task.users.items()}
    split = task.headline_split
    return Measured(
        {split: metrics.evaluate(lists[split], truth[split], config.ks) for split in task.users},
        metrics.recall_of_users(
            truth[split].contains(lists[split]), truth[split].row_lengths, config.headline_k
        ),
    )


def _show_users(task: Task, config: EvaluationConfig, context: Context) -> list[showcase.ShownUser]:
    """Return the users of the report; none where there is no test split to compare with."""
    if "test" not in task.users:
        return []
    shape = {"num_users": task.train.num_rows, "num_items": task.train.num_cols}
    scores = inner_product(*read_embeddings(context.inputs["embeddings"], **shape))
    dataset = context.inputs["dataset"]
    return showcase.show_users(
        dataset,
        task.train,
        task.held_out["test"],
        scores,
        config.report,
        removed=task.removed,
    )


def _counts(task: Task, results: Mapping[str, SplitMetrics]) -> dict[str, int]:
    counts = {f"num_{split}_users": users.numel() for split, users in task.users.items()}
    cold = _item_counts(task.train) == 0
    cold[task.removed] = False
    counts |= {"num_cold_items": int(cold.sum()), "num_removed_items": task.removed.numel()}
    return counts | {"num_models": len(results)}


def _item_counts(train: CSR) -> Int64[Tensor, " num_items"]:
    return torch.bincount(train.columns, minlength=train.num_cols)


def summary_lines(outcome: report.Outcome, report_path: Path) -> list[str]:
    """Return what is told at the end: a table, the margins of alignrec, where the report is."""
    split, k = outcome.split, outcome.k
    names = [f"{metric}@{k}" for metric in ("recall", "ndcg", "precision", "map")]
    lines = ["  ".join([f"{split:<12}", *(f"{name:>12}" for name in names)])]
    for model, values in outcome.results.items():
        numbers = (f"{values[split][name]:>12.4f}" for name in names)
        lines.append("  ".join([f"{model:<12}", *numbers]))
    lines += [
        f"alignrec over {other}: {outcome.margins[other].words} {split} {outcome.headline}"
        for other in ("popularity", "ablation")
        if other in outcome.margins
    ]
    return [*lines, f"report: {report_path}"]
