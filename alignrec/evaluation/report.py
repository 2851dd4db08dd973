"""The report: metrics, curves, pictures and lineage as one self-contained HTML page."""

import dataclasses
import datetime
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from alignrec import artifacts
from alignrec.data import schema
from alignrec.evaluation import charts, lineage, showcase
from alignrec.evaluation.charts import Chart
from alignrec.evaluation.comparison import Margin
from alignrec.evaluation.reconstructions import read_reconstructions
from alignrec.evaluation.statistics import group_rejected, read_flows, read_statistics
from alignrec.pretrain.verdict import verdict
from alignrec.telemetry import read_history

MODEL_WORDS = {
    "alignrec": ("AlignRec", "both stages: content and interactions aligned"),
    "ablation": ("Ablation", "the same model with other settings"),
    "popularity": ("Popularity", "the most chosen training items, the same for everybody"),
    "zero_shot": (
        "Zero-shot",
        "content nearest to what the user chose, without stage 2",
    ),
    "item_cf": ("Item-CF", "content neighbours of the user's items, without stage 2"),
}
SPLIT_WORDS = {
    "test": "Test",
    "valid": "Validation",
    "test_cold": "Test, cold items only",
}
_ABBREVIATIONS = ("bpr", "cca", "uia", "reg", "l2")

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was measured.

    Attributes:
        results: model -> split -> metric -> number.
        margins: other model -> how far alignrec is ahead of it in the headline metric.
        split: split of the headline.
        k: list length of the headline, items.
    """

    results: Results
    margins: Mapping[str, Margin]
    split: str
    k: int

    @property
    def headline(self) -> str:
        """Name of the metric of the headline."""
        return f"recall@{self.k}"


@dataclasses.dataclass(frozen=True)
class Page:
    """What the page is made of.

    Attributes:
        outcome: the metrics.
        shown: users whose recommendations are shown.
        counts: counts of the evaluation itself.
        inputs: artifact folders, as the stage's context has them.
        run: name of the run.
    """

    outcome: Outcome
    shown: list[showcase.ShownUser]
    counts: Mapping[str, int]
    inputs: Mapping[str, Path]
    run: str


@dataclasses.dataclass(frozen=True)
class MetricTable:
    """One split's metrics: a row a model, the best of each column marked."""

    split: str
    title: str
    names: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    best: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class Curves:
    """Charts of a stage: those that everybody looks at, and the others."""

    main: list[Chart]
    more: list[Chart]


def write(path: Path, page: Page) -> None:
    """Write the page to an HTML file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(page_values(page)), encoding="utf-8")


def render(values: Mapping[str, Any]) -> str:
    """Fill the template; whatever comes from the catalogue is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("alignrec.evaluation", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["count"] = lambda n: f"{n:,}"
    environment.filters["in_words"] = lineage.in_words
    environment.filters["short"] = charts.number
    environment.filters["metric"] = metric_words
    environment.filters["share"] = share_words
    style = resources.files("alignrec.evaluation").joinpath("templates/report.css")
    template = environment.get_template("report.html")
    return template.render(style=style.read_text(encoding="utf-8"), **values).lstrip()


def page_values(page: Page) -> dict[str, Any]:
    """Collect everything that the template shows."""
    outcome, inputs = page.outcome, page.inputs
    results, headline = outcome.results, outcome.headline
    dataset = artifacts.read(inputs["dataset"], "dataset")
    models = MODEL_WORDS | ablation_words(inputs)
    rejected = group_rejected(quarantine_reasons(inputs["dataset"]))
    curve_names = {"embeddings": models["alignrec"][0], "ablation": models["ablation"][0]}
    return {
        "run": page.run,
        "created": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        "producer": artifacts.producer(),
        "dataset": dataset.counts,
        "counts": page.counts,
        "headline": headline,
        "headline_split": SPLIT_WORDS[outcome.split],
        "headline_value": results["alignrec"][outcome.split][headline],
        "margins": outcome.margins,
        "bars": [(model, values[outcome.split][headline]) for model, values in results.items()],
        "models": models,
        "summary": metric_table(results, outcome.split, summary_names(outcome)),
        "tables": [
            metric_table(results, name, tuple(results["alignrec"][name]))
            for name in SPLIT_WORDS
            if name in results["alignrec"]
        ],
        "users": page.shown,
        "aspect": aspect_ratio(page.shown),
        "steps": lineage.trace(inputs),
        "quarantine": rejected,
        "flows": read_flows(dataset.counts, dataset.facts, rejected),
        "statistics": read_statistics(_without(dataset.facts, "quarantine")),
        "pretrain": curves(inputs, {"encoder": "encoder"}, first="loss"),
        "reconstructions": (read_reconstructions(inputs["encoder"]) if "encoder" in inputs else []),
        "held_out": held_out_words(inputs),
        "align": curves(inputs, curve_names, first=f"valid/{headline}"),
        "align_facts": artifacts.read(inputs["embeddings"]).facts,
    }


def ablation_words(inputs: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Name the ablation by the settings in which it differs from the model."""
    if "ablation" not in inputs:
        return {}
    own, other = (artifacts.read(inputs[kind]).config for kind in ("embeddings", "ablation"))
    changed = {name: value for name, value in other.items() if own.get(name) != value}
    if changed == {"content": False}:
        return {"ablation": ("Without content", "the same model from interactions alone")}
    listed = ", ".join(f"{name} {value}" for name, value in changed.items())
    return {"ablation": ("Ablation", f"the same model with {listed or 'another seed'}")}


def held_out_words(inputs: Mapping[str, Path]) -> list[str]:
    """Return what pretraining found on items that it did not train on; nothing without any."""
    if "encoder" not in inputs:
        return []
    facts = artifacts.read(inputs["encoder"], "encoder").facts
    lines = verdict(facts.get("held_out", {}))
    return [line[0].upper() + line[1:] for line in lines]


def metric_words(name: str) -> str:
    """Return e.g. "NDCG@20" for ndcg@20."""
    metric, at, k = name.partition("@")
    return (metric.upper() if metric in ("ndcg", "map") else metric.capitalize()) + at + k


def share_words(percent: float) -> str:
    """Return e.g. "12.3 %", "<0.1 %" for what is there but next to nothing."""
    return "<0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %"


def summary_names(outcome: Outcome) -> tuple[str, ...]:
    """Return the few metrics of the first table: recall and NDCG at up to two lengths."""
    names = outcome.results["alignrec"][outcome.split]
    ks = [k for k in sorted({10, outcome.k}) if f"recall@{k}" in names]
    return tuple(f"{metric}@{k}" for metric in ("recall", "ndcg") for k in ks)


def metric_table(results: Results, split: str, names: tuple[str, ...]) -> MetricTable:
    """Arrange one split's metrics as a table."""
    rows = tuple(
        (model, tuple(values[split][name] for name in names)) for model, values in results.items()
    )
    best = tuple(max(column) for column in zip(*(numbers for _, numbers in rows), strict=True))
    return MetricTable(split, SPLIT_WORDS[split], names, rows, best)


def quarantine_reasons(dataset: Path) -> list[tuple[str, str, int]]:
    """Return (source, reason, rows) of what the preparation set aside, most frequent first."""
    path = dataset / "quarantine.parquet"
    if not path.exists():
        return []
    table = schema.read_table(path, columns=["source", "reason"])
    groups = table.group_by(["source", "reason"]).aggregate([([], "count_all")]).to_pylist()
    rows = [(group["source"], group["reason"], group["count_all"]) for group in groups]
    return sorted(rows, key=lambda row: (-row[2], row[0], row[1]))


def curves(inputs: Mapping[str, Path], kinds: Mapping[str, str], first: str) -> Curves:
    """Return the curves of artifacts of one stage, a chart for each measurement.

    Args:
        inputs: artifact folders.
        kinds: input -> name of its curve; inputs that are absent are left out.
        first: measurement whose chart comes first.
    """
    histories = {name: read_history(inputs[k]) for k, name in kinds.items() if k in inputs}
    names = charts.measurement_names(histories)
    main = [n for n in names if n == first or any(w in n for w in ("loss", "accuracy", "error"))]
    main.sort(key=lambda name: name != first)
    more = [name for name in names if name not in main and name != "epoch"]
    return Curves(
        [charts.history_chart(name, curve_words(name), histories) for name in main],
        [charts.history_chart(name, curve_words(name), histories) for name in more],
    )


def curve_words(name: str) -> str:
    """Return e.g. "Loss: BPR" for loss/bpr and "Validation Recall@20" for valid/recall@20."""
    group, slash, rest = name.partition("/")
    if group == "valid" and "@" in rest:
        return f"Validation {metric_words(rest)}"
    words = rest.upper() if rest in _ABBREVIATIONS else rest.replace("_", " ").replace("/", " ")
    return f"{group.replace('_', ' ').capitalize()}{': ' if slash else ''}{words}"


def aspect_ratio(shown: list[showcase.ShownUser]) -> float:
    """Return the usual width / height of the pictures shown, so that tiles fit them."""
    tiles = [tile for user in shown for tile in (*user.history, *user.recommended)]
    ratios = [t.thumbnail.width / t.thumbnail.height for t in tiles if t.thumbnail]
    return float(np.clip(np.median(ratios), 0.5, 2.0)) if ratios else 1.0


def _without(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != name}
