"""Geometry of the report's curves: numbers by step in, positions for an inline SVG out."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 30
_MAX_POINTS = 160

History = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve, in the chart's coordinates."""

    name: str
    points: tuple[tuple[float, float], ...]
    first: str
    last: str

    @property
    def path(self) -> str:
        """The curve as an SVG path."""
        return "M" + " L".join(f"{x:.1f} {y:.1f}" for x, y in self.points)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A titled plot: curves and labelled ticks at positions of a WIDTH x HEIGHT box."""

    title: str
    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = _LEFT
    right: int = WIDTH - _RIGHT
    bottom: int = HEIGHT - _BOTTOM

    @property
    def summary(self) -> str:
        """What a screen reader says instead of the picture."""
        parts = (f"{line.name} from {line.first} to {line.last}" for line in self.lines)
        return f"{self.title}: {'; '.join(parts)}"


def history_chart(name: str, title: str, histories: Mapping[str, History]) -> Chart:
    """Return the chart of one measurement, with a curve for each history that has it.

    Args:
        name: the measurement, e.g. "loss/bpr"; at least one history has it.
        title: words above the chart.
        histories: name of a run -> its rows, as ``telemetry.read_history`` returns them.
    """
    curves = {run: _points(rows, name) for run, rows in histories.items()}
    return line_chart(title, {run: points for run, points in curves.items() if points})


def measurement_names(histories: Mapping[str, History]) -> list[str]:
    """Return every measured name but step and time, in the order of first appearance."""
    rows = (row for history in histories.values() for row in history)
    names = dict.fromkeys(name for row in rows for name, v in row.items() if v is not None)
    return [name for name in names if name not in ("step", "time")]


def line_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    """Lay out curves of (x, y) points, ascending in x; none is empty."""
    xs = [x for points in curves.values() for x, _ in points]
    ys = [y for points in curves.values() for _, y in points]
    x_scale, y_scale = ticks(min(xs), max(xs), 5), ticks(min(ys), max(ys), 4)

    def place_x(x: float) -> float:
        low, high = min(xs), max(xs)
        return _LEFT + (WIDTH - _RIGHT - _LEFT) * ((x - low) / (high - low) if high > low else 0.5)

    def place_y(y: float) -> float:
        low, high = min(y_scale[0], min(ys)), max(y_scale[-1], max(ys))
        return (
            HEIGHT
            - _BOTTOM
            - (HEIGHT - _BOTTOM - _TOP) * ((y - low) / (high - low) if high > low else 0.5)
        )

    lines = tuple(
        Line(
            name,
            tuple((place_x(x), place_y(y)) for x, y in thin_out(points)),
            number(points[0][1]),
            number(points[-1][1]),
        )
        for name, points in curves.items()
    )
    x_ticks = tuple((place_x(x), number(x)) for x in x_scale if min(xs) <= x <= max(xs))
    return Chart(title, lines, x_ticks, tuple((place_y(y), number(y)) for y in y_scale))


def ticks(low: float, high: float, count: int) -> list[float]:
    """Return about ``count`` round numbers that enclose low..high (one when they are equal)."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def thin_out(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most 160 of the points, evenly spaced, with the first and the last."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = (len(points) - 1) / (_MAX_POINTS - 1)
    return [points[round(i * stride)] for i in range(_MAX_POINTS)]


def number(value: float) -> str:
    """Return a number short enough for an axis: 1,200, 0.035, 2.5k, 1.2e-05."""
    size = abs(value)
    if size >= 10_000:
        return f"{value / 1e6:.3g}M" if size >= 1e6 else f"{value / 1e3:.3g}k"
    if value == int(value):
        return f"{int(value):,}"
    return f"{value:.3g}"


def _points(rows: History, name: str) -> list[tuple[float, float]]:
    found = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return sorted((float(x), float(y)) for x, y in found)
