"""The report: metrics, curves, pictures and lineage as one self-contained HTML page."""

import dataclasses
import datetime
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from alignrec import artifacts
from alignrec.evaluation import charts, lineage, showcase
from alignrec.evaluation.charts import Chart
from alignrec.evaluation.config import EvaluationConfig
from alignrec.evaluation.statistics import read_statistics
from alignrec.telemetry import read_history

MODEL_WORDS = {
    "alignrec": ("AlignRec", "both stages: content and interactions aligned"),
    "ablation": ("Ablation", "the same model with other settings, by default without content"),
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
_RECONSTRUCTIONS = ("original", "masked", "predicted")
_MAX_RECONSTRUCTIONS = 6

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


@dataclasses.dataclass(frozen=True)
class Margin:
    """By how much the trained model is ahead of another one."""

    over: str
    difference: float
    relative: float | None


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


def write(
    path: Path,
    results: Results,
    shown: list[showcase.ShownUser],
    counts: Mapping[str, int],
    config: EvaluationConfig,
    inputs: Mapping[str, Path],
    *,
    run: str,
) -> None:
    """Write the page.

    Args:
        path: the HTML file.
        results: model -> split -> metric -> number.
        shown: users whose recommendations are shown.
        counts: counts of the evaluation itself.
        config: the stage's settings.
        inputs: artifact folders, as the stage's context has them.
        run: name of the run.
    """
    page = render(page_values(results, shown, counts, config, inputs, run=run))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


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
    environment.filters["percent"] = lambda x: f"{x:+.1%}".replace("%", " %")
    environment.filters["in_words"] = lineage.in_words
    environment.filters["short"] = charts.number
    environment.filters["metric"] = metric_words
    style = resources.files("alignrec.evaluation").joinpath("templates/report.css")
    template = environment.get_template("report.html")
    return template.render(style=style.read_text(encoding="utf-8"), **values).lstrip()


def page_values(
    results: Results,
    shown: list[showcase.ShownUser],
    counts: Mapping[str, int],
    config: EvaluationConfig,
    inputs: Mapping[str, Path],
    *,
    run: str,
) -> dict[str, Any]:
    """Collect everything that the template shows."""
    dataset = artifacts.read(inputs["dataset"], "dataset")
    split = "test" if "test" in results["alignrec"] else "valid"
    headline = f"recall@{config.headline_k}"
    return {
        "run": run,
        "created": datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC"),
        "producer": artifacts.producer(),
        "dataset": dataset.counts,
        "counts": counts,
        "headline": headline,
        "headline_split": SPLIT_WORDS[split],
        "headline_value": results["alignrec"][split][headline],
        "margins": margins(results, split, headline),
        "bars": [(model, values[split][headline]) for model, values in results.items()],
        "models": MODEL_WORDS,
        "summary": metric_table(results, split, summary_names(config)),
        "tables": [
            metric_table(results, name, tuple(results["alignrec"][name]))
            for name in SPLIT_WORDS
            if name in results["alignrec"]
        ],
        "users": shown,
        "aspect": aspect_ratio(shown),
        "steps": lineage.trace(inputs),
        "quarantine": quarantine_reasons(inputs["dataset"]),
        "statistics": read_statistics(_without(dataset.facts, "quarantine")),
        "pretrain": curves(inputs, {"encoder": "encoder"}, first="loss"),
        "reconstructions": reconstructions(inputs),
        "align": curves(
            inputs, {"embeddings": "AlignRec", "ablation": "Ablation"}, first=f"valid/{headline}"
        ),
        "align_facts": artifacts.read(inputs["embeddings"]).facts,
    }


def metric_words(name: str) -> str:
    """Return e.g. "NDCG@20" for ndcg@20."""
    metric, at, k = name.partition("@")
    return (metric.upper() if metric in ("ndcg", "map") else metric.capitalize()) + at + k


def margins(results: Results, split: str, metric: str) -> dict[str, Margin]:
    """Return the margin of alignrec over each other model, in absolute and relative terms."""
    own = results["alignrec"][split][metric]
    return {
        model: Margin(
            model,
            own - values[split][metric],
            own / values[split][metric] - 1 if values[split][metric] else None,
        )
        for model, values in results.items()
        if model != "alignrec"
    }


def summary_names(config: EvaluationConfig) -> tuple[str, ...]:
    """Return the few metrics of the first table: recall and NDCG at up to two lengths."""
    ks = sorted({config.headline_k, *(k for k in config.ks if k == 10)})
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
    table = pq.read_table(path, columns=["source", "reason"])
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
    main = [n for n in names if n == first or n.startswith(("loss", "accuracy", "error"))]
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


def reconstructions(inputs: Mapping[str, Path]) -> list[dict[str, showcase.Thumbnail]]:
    """Return what the encoder saw and predicted of a few masked pictures."""
    path = inputs["encoder"] / "reconstructions.npz" if "encoder" in inputs else None
    if path is None or not path.exists():
        return []
    with np.load(path, allow_pickle=False) as arrays:
        if not all(name in arrays for name in _RECONSTRUCTIONS):
            return []
        pictures = {name: arrays[name][:_MAX_RECONSTRUCTIONS] for name in _RECONSTRUCTIONS}
    return [
        {
            name: showcase.encode_picture(Image.fromarray(_bytes(pictures[name][i])))
            for name in _RECONSTRUCTIONS
        }
        for i in range(min(len(stack) for stack in pictures.values()))
    ]


def aspect_ratio(shown: list[showcase.ShownUser]) -> float:
    """Return the usual width / height of the pictures shown, so that tiles fit them."""
    tiles = [tile for user in shown for tile in (*user.history, *user.recommended)]
    ratios = [t.thumbnail.width / t.thumbnail.height for t in tiles if t.thumbnail]
    return float(np.clip(np.median(ratios), 0.5, 2.0)) if ratios else 1.0


def _without(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key != name}


def _bytes(picture: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if picture.dtype == np.uint8:
        return picture
    return np.asarray(picture * 255).clip(0, 255).round().astype(np.uint8)
