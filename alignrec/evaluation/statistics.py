"""A dataset's facts as flows, histograms, quantiles and numbers (manifest -> report)."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

_QUANTILE_WORDS = {
    "0.0": "min",
    "0.25": "25 %",
    "0.5": "median",
    "0.75": "75 %",
    "0.95": "95 %",
    "1.0": "max",
}
_TITLES = {
    "images: longest side pixels": "pictures by longest side, pixels",
    "text: characters": "texts by length, characters",
    "interactions: per user": "users by interactions",
    "interactions: per item": "items by interactions",
}
# Facts of the log: what a step left out -> what the page calls it, in the order of the steps.
_STEPS = {
    "unknown_items_dropped": "items that the catalogue lacks",
    "below_min_rating": "below the rating threshold",
    "repeated": "the same pair again",
    "outside_of_core": "too rare users and items",
}
_SOURCES = {"items": "Catalogue", "images": "Pictures", "interactions": "Log"}


@dataclasses.dataclass(frozen=True)
class Part:
    """A share of the raw rows: kept, left out as the recipe says, or bad."""

    label: str
    count: int
    kind: Literal["kept", "left-out", "bad"]


@dataclasses.dataclass(frozen=True)
class Flow:
    """What became of the rows of one source."""

    title: str
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """All rows that were read, at least 1."""
        return max(1, sum(part.count for part in self.parts))


@dataclasses.dataclass(frozen=True)
class Rejected:
    """The bad rows of one source by reason, most frequent first."""

    source: str
    reasons: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        """All bad rows of the source."""
        return sum(count for _, count in self.reasons)


@dataclasses.dataclass(frozen=True)
class Histogram:
    """Counts from an edge up to below the next one; ``note`` tells the distribution in numbers."""

    title: str
    bars: tuple[tuple[str, int], ...]
    note: str = ""

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
    known = list(_TITLES.values())
    result.histograms.sort(key=lambda h: known.index(h.title) if h.title in known else len(known))
    return result


def read_flows(
    counts: Mapping[str, int], facts: Mapping[str, Any], rejected: Sequence[Rejected]
) -> list[Flow]:
    """Return what became of the catalogue, its pictures and the log.

    Args:
        counts: counts of the dataset.
        facts: facts of the dataset; what they do not tell is left out.
        rejected: the quarantine.
    """
    bad = {group.source: group.total for group in rejected}
    flows = []
    if images := facts.get("images"):
        items = counts["num_items"] - counts.get("num_removed", 0)
        flows = [
            _flow("items", items, "items kept", bad),
            _flow("images", images["good"], "pictures kept", bad),
        ]
    log = facts.get("interactions", {})
    if "rows" in log:
        dropped = [Part(words, log.get(name, 0), "left-out") for name, words in _STEPS.items()]
        flows.append(_flow("interactions", log["left"], "interactions kept", bad, dropped))
    return flows


def _flow(
    source: str, kept: int, words: str, bad: Mapping[str, int], dropped: Sequence[Part] = ()
) -> Flow:
    title = _SOURCES[source]
    parts = [Part(words, kept, "kept"), *dropped, Part("bad", bad.get(title, 0), "bad")]
    return Flow(title, tuple(part for part in parts if part.count))


def group_rejected(reasons: Sequence[tuple[str, str, int]]) -> list[Rejected]:
    """Group (source, reason, rows) by source, the order of reasons as given."""
    sources = dict.fromkeys(source for source, _, _ in reasons)
    return [
        Rejected(
            _SOURCES.get(source, source),
            tuple((reason_words(reason), n) for own, reason, n in reasons if own == source),
        )
        for source in sources
    ]


def reason_words(reason: str) -> str:
    """Return e.g. "Unknown format" for image_unknown_format."""
    plain = reason.removeprefix("image_").replace("_", " ")
    plain = plain.replace("http", "HTTP").replace("url", "URL")
    return plain[:1].upper() + plain[1:]


def _visit(value: Any, path: tuple[str, ...], result: Statistics) -> None:  # noqa: ANN401
    title = ": ".join(part.replace("_", " ") for part in path)
    title = _TITLES.get(title, title)
    if not isinstance(value, Mapping):
        if isinstance(value, (int, float, str)):
            result.numbers.append((title, value))
        return
    if _are_numbers(value.get("edges")) and _are_numbers(value.get("counts")):
        note = " · ".join(f"{name} {number:g}" for name, number in _quantiles(value))
        result.histograms.append(Histogram(title, _bars(value["edges"], value["counts"]), note))
    elif isinstance(value.get("quantiles"), Mapping):
        result.quantiles.append(Quantiles(title, _quantiles(value)))
    else:
        for name, inner in value.items():
            _visit(inner, (*path, str(name)), result)


def _quantiles(value: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    numbers = {"mean": value.get("mean"), **(value.get("quantiles") or {})}
    return tuple(
        (_QUANTILE_WORDS.get(str(name), str(name)), number)
        for name, number in numbers.items()
        if isinstance(number, (int, float))
    )


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
