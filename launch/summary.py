"""What a run says at its end: the stages, the metrics, where the report is (runner -> terminal)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.runner import Result

_PREFERRED = "recall@20"
_COMPARED = {"ablation": "the same model without content", "popularity": "popularity"}
_METRICS, _REPORT = "metrics.json", Path("report") / "index.html"


def as_json(results: Sequence[Result], run_dir: Path) -> dict[str, Any]:
    """Return the run as plain JSON values, for a program that reads them."""
    return {
        "state": "done",
        "run_dir": str(run_dir),
        "stages": [
            {
                "name": result.name,
                "state": result.state,
                "seconds": round(result.seconds, 2),
                "path": str(result.path),
                "counts": result.counts,
            }
            for result in results
        ],
        "metrics": _metrics(results),
        "report": str(_report(results) or "") or None,
    }


def as_text(results: Sequence[Result], run_dir: Path) -> str:
    """Return the run as a table and the lines that matter."""
    rows = [("stage", "state", "seconds", "counts")]
    rows += [
        (
            result.name,
            result.state,
            f"{result.seconds:.1f}" if result.state == "ran" else "",
            ", ".join(f"{count:,} {_noun(name)}" for name, count in result.counts.items()),
        )
        for result in results
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.append(f"artifacts: {run_dir}")
    lines += _comparison(_metrics(results))
    report = _report(results)
    if report is not None:
        lines.append(f"report: {report}")
    return "\n".join(lines)


def _comparison(metrics: Mapping[str, Any] | None) -> list[str]:
    """Return the test metric of each model, and how far the first is ahead."""
    if not metrics or "test" not in metrics.get("alignrec", {}):
        return []
    own = metrics["alignrec"]["test"]
    name = _PREFERRED if _PREFERRED in own else next(iter(own))
    others = {
        model: float(splits["test"][name])
        for model, splits in metrics.items()
        if model != "alignrec" and splits.get("test", {}).get(name) is not None
    }
    shown = [f"alignrec {own[name]:.4f}", *(f"{m} {value:.4f}" for m, value in others.items())]
    lines = [f"test {name}: {', '.join(shown)}"]
    for model, words in _COMPARED.items():
        if others.get(model):
            margin = 100 * (own[name] / others[model] - 1)
            lines.append(f"alignrec against {words}: {margin:+.1f} %")
    return lines


def _metrics(results: Sequence[Result]) -> dict[str, Any] | None:
    path = _file(results, Path(_METRICS))
    if path is None:
        return None
    metrics: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return metrics


def _report(results: Sequence[Result]) -> Path | None:
    return _file(results, _REPORT)


def _file(results: Sequence[Result], name: Path) -> Path | None:
    for result in results:
        path = result.path / name
        if result.name == "evaluation" and path.is_file():
            return path
    return None


def _noun(name: str) -> str:
    return name.removeprefix("num_").replace("_", " ")
