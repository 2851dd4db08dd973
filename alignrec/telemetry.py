"""What a long stage tells while it runs: JSON lines, TensorBoard, Ray metrics, progress with ETA.

The JSON lines are the record: ``history.jsonl`` in the artifact is what the report draws. Rank 0
writes; on other ranks every call is a no-op.
"""

import contextlib
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

HISTORY = "history.jsonl"
_PROGRESS_SECONDS = 5.0


class Telemetry:
    """Writer of one stage's measurements.

    A row of ``history.jsonl`` is {"step": int, "time": unix seconds, name: number, ...}. After a
    resume, ``rewind`` drops the rows past the checkpoint, so an interrupted run leaves the same
    steps as an undisturbed one.
    """

    def __init__(self, log_dir: Path, stage: str, *, enabled: bool = True) -> None:
        self.stage = stage
        self.enabled = enabled
        self.path = log_dir / HISTORY
        self._tensorboard: Any = None
        self._gauges: dict[str, Any] = {}
        self._ray: Any = None  # looked up when needed: a stage may start Ray after this
        if enabled:
            log_dir.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.enabled:
            return
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    def rewind(self, step: int, *, keep_start: bool = False) -> None:
        """Drop every row after ``step``; 0 starts the record afresh.

        Args:
            step: the last one whose rows stay.
            keep_start: rows of step 0, from before the first step, stay also where ``step`` is 0.
        """
        if not self.enabled:
            return
        self._file.close()
        rows = read_history(self.path.parent)
        kept = [row for row in rows if row["step"] <= step and (step > 0 or keep_start)]
        spare = self.path.with_suffix(".rewinding")
        spare.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        spare.replace(self.path)
        self._file = self.path.open("a", encoding="utf-8")

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Record numbers at an optimizer step.

        Args:
            values: name -> number; names are slash-separated, e.g. "loss/bpr", "valid/recall@20".
            step: optimizer step, counted over the whole run.
        """
        if not self.enabled:
            return
        numbers = {name: float(value) for name, value in values.items()}
        row = {"step": step, "time": round(time.time(), 3)}
        row |= {name: v if math.isfinite(v) else None for name, v in numbers.items()}  # type: ignore[misc]
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        writer = self._writer()
        for name, value in numbers.items():
            writer.add_scalar(f"{self.stage}/{name}", value, step)
            self._set_gauge(name, value)

    def gauge(self, name: str, value: float, **tags: str) -> None:
        """Show a number in the Ray dashboard and nowhere else.

        Args:
            name: of the metric; the stage's name goes before it.
            value: the number now.
            **tags: what tells apart the lines of one metric, e.g. reason="image_missing".
        """
        if self.enabled:
            self._set_gauge(name, value, tags)

    def say(self, message: str) -> None:
        """Print one line for the person who watches."""
        if self.enabled:
            print(f"[{self.stage}] {message}", flush=True)

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, *, done: int = 0) -> Iterator["Progress"]:
        """Show how far a loop is, how fast and how long it will still take.

        Args:
            total: number of units in the whole loop.
            unit: plural noun, e.g. "items".
            done: units finished before a resume; they do not count for the rate.
        """
        bar = Progress(self, total, unit, done)
        yield bar
        bar.finish()

    def _writer(self) -> Any:  # noqa: ANN401 - torch's SummaryWriter, imported late
        if self._tensorboard is None:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(str(self.path.parent / "tensorboard"))
        return self._tensorboard

    def _set_gauge(self, name: str, value: float, tags: Mapping[str, str] | None = None) -> None:
        tags = tags or {}
        self._ray = self._ray or (_ray_metrics() if self.enabled else None)
        if self._ray is None:
            return
        plain = "alignrec_" + "".join(c if c.isalnum() else "_" for c in f"{self.stage}_{name}")
        if plain not in self._gauges:
            self._gauges[plain] = self._ray.Gauge(
                plain,
                description=f"{name} of stage {self.stage}",
                tag_keys=("stage", "run", *sorted(tags)),
            )
        run = os.environ.get("ALIGNREC_RUN", "")
        self._gauges[plain].set(value, tags={"stage": self.stage, "run": run, **tags})


@dataclasses.dataclass
class Progress:
    """A loop's position, printed at most every few seconds."""

    telemetry: Telemetry
    total: int
    unit: str
    done: int

    def __post_init__(self) -> None:
        self._start = self._shown = time.monotonic()
        self._first = self.done
        self._note = ""

    def update(self, count: int = 1, *, note: str = "") -> None:
        """Count ``count`` more units; ``note`` is shown beside the position, e.g. the loss."""
        self.done += count
        self._note = note or self._note
        now = time.monotonic()
        if now - self._shown >= _PROGRESS_SECONDS:
            self._shown = now
            self._show()

    @property
    def rate(self) -> float:
        """Units a second since the loop (re)started."""
        return (self.done - self._first) / max(time.monotonic() - self._start, 1e-9)

    def finish(self) -> None:
        """Print the last position with the time it took."""
        took = time.monotonic() - self._start
        self._line(f"{self.done:,}/{self.total:,} {self.unit} in {took:.1f} s")

    def _show(self) -> None:
        left = (self.total - self.done) / self.rate if self.rate else math.inf
        eta = f"{int(left) // 60}:{int(left) % 60:02d}" if math.isfinite(left) else "?"
        self._line(f"{self.done:,}/{self.total:,} {self.unit}, ETA {eta}")

    def _line(self, position: str) -> None:
        rate = f"{self.rate:,.0f}" if self.rate >= 10 else f"{self.rate:.2f}"
        note = f", {self._note}" if self._note else ""
        self.telemetry.say(f"{position} ({rate} {self.unit}/s{note})")
        self.telemetry._set_gauge(f"{self.unit}_per_second", self.rate)
        self.telemetry._set_gauge(f"{self.unit}_done", self.done)


def read_history(log_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of a stage's ``history.jsonl``; a torn last line is left out."""
    path = log_dir / HISTORY
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # killed in the middle of a line: the step is done again after the resume
    return rows


def _ray_metrics() -> Any:  # noqa: ANN401 - the module ray.util.metrics, or None
    """Return Ray's metrics module when this process is part of a Ray cluster."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return None
    from ray.util import metrics

    return metrics
