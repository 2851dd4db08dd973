"""A stage's facts as histograms, quantiles and numbers (manifest -> report)."""

import dataclasses
from collections.abc import Mapping
from typing import Any

_QUANTILE_WORDS = {
    "0.0": "min",
    "0.25": "25 %",
    "0.5": "median",
    "0.75": "75 %",
    "0.95": "95 %",
    "1.0": "max",
}


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts from an edge up to below the next one."""

    title: str
    bars: tuple[tuple[str, int], ...]

    @property
    def largest(self) -> int:
        """Height of the highest bar, at least 1."""
        return max(1, *(count for _, count in self.bars))


@dataclasses.dataclass(frozen=True)
class Quantiles:
    """A distribution in a few numbers."""

    title: str
    values: tuple[tuple[str, float], ...]


@dataclasses.dataclass
class Statistics:
    """Everything that could be read from the facts; what has another shape is left out."""

    numbers: list[tuple[str, Any]] = dataclasses.field(default_factory=list)
    histograms: list[Histogram] = dataclasses.field(default_factory=list)
    quantiles: list[Quantiles] = dataclasses.field(default_factory=list)


def read_statistics(facts: Mapping[str, Any]) -> Statistics:
    """Sort facts by shape.

    A mapping of ``edges`` and ``counts`` is a histogram, one with ``quantiles`` a distribution, any
    other mapping a group; numbers, texts and truth values are shown as they are.
    """
    result = Statistics()
    _visit(facts, (), result)
    return result


def _visit(value: Any, path: tuple[str, ...], result: Statistics) -> None:  # noqa: ANN401
    title = ": ".join(part.replace("_", " ") for part in path)
    if not isinstance(value, Mapping):
        if isinstance(value, (int, float, str)):
            result.numbers.append((title, value))
        return
    if _are_numbers(value.get("edges")) and _are_numbers(value.get("counts")):
        result.histograms.append(Histogram(title, _bars(value["edges"], value["counts"])))
    elif isinstance(value.get("quantiles"), Mapping):
        numbers = {"mean": value.get("mean"), **value["quantiles"]}
        known = tuple(
            (_QUANTILE_WORDS.get(str(k), str(k)), v)
            for k, v in numbers.items()
            if isinstance(v, (int, float))
        )
        result.quantiles.append(Quantiles(title, known))
    else:
        for name, inner in value.items():
            _visit(inner, (*path, str(name)), result)


def _bars(edges: list[float], counts: list[int]) -> tuple[tuple[str, int], ...]:
    """Label the bars; empty ones at both ends are left out."""
    following = [*edges[1:], None]
    bars = [
        (_interval(low, high), count)
        for low, high, count in zip(edges, following, counts, strict=False)
    ]
    filled = [i for i, (_, count) in enumerate(bars) if count]
    return tuple(bars[filled[0] : filled[-1] + 1]) if filled else tuple(bars[:1])


def _interval(low: float, high: float | None) -> str:
    if high is None:
        return f"{low:g}+"
    last = high - 1 if float(high).is_integer() else high
    return f"{low:g}" if last == low else f"{low:g}-{last:g}"


def _are_numbers(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, list) and all(isinstance(v, (int, float)) for v in value)
