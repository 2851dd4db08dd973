from pathlib import Path

import pytest

from alignrec import telemetry
from alignrec.telemetry import Telemetry, read_history


def test_rows_are_kept_and_rewound(tmp_path: Path) -> None:
    with Telemetry(tmp_path, "align") as log:
        for step in (1, 2, 3):
            log.log({"loss/bpr": step / 2, "bad": float("nan")}, step=step)
    with Telemetry(tmp_path, "align") as log:
        log.rewind(2)
        log.log({"loss/bpr": 9.0}, step=3)
    rows = read_history(tmp_path)
    assert [(row["step"], row["loss/bpr"]) for row in rows] == [(1, 0.5), (2, 1.0), (3, 9.0)]
    assert rows[0]["bad"] is None  # JSON has no NaN
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resume_before_the_first_record_keeps_what_was_measured_at_the_start(
    tmp_path: Path,
) -> None:
    with Telemetry(tmp_path, "align") as log:
        for step in (0, 2):
            log.log({"x": 1.0}, step=step)
        log.rewind(0, keep_start=True)
        assert [row["step"] for row in read_history(tmp_path)] == [0]
        log.rewind(0)
        assert read_history(tmp_path) == []


def test_a_torn_last_line_is_left_out(tmp_path: Path) -> None:
    with Telemetry(tmp_path, "align") as log:
        log.log({"x": 1.0}, step=1)
        log.log({"x": 2.0}, step=2)
    path = tmp_path / telemetry.HISTORY
    path.write_text(path.read_text()[:-4])
    assert [row["step"] for row in read_history(tmp_path)] == [1]


def test_other_ranks_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Telemetry(tmp_path / "none", "align", enabled=False) as log:
        log.log({"x": 1.0}, step=1)
        log.rewind(0)
        with log.progress(10, "items") as bar:
            bar.update(10)
    assert not (tmp_path / "none").exists()
    assert capsys.readouterr().out == ""


def test_progress_shows_rate_and_time_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: clock[0])
    with Telemetry(tmp_path, "features") as log, log.progress(100, "items", done=20) as bar:
        clock[0] += 10
        bar.update(20, note="loss 1.5")  # 2 items/s, 60 left
        bar.update(1)  # too soon for another line
        clock[0] += 29.5
        bar.update(59)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[features] 40/100 items, ETA 0:30 (2.00 items/s, loss 1.5)"
    assert lines[-1].startswith("[features] 100/100 items in 39.5 s")
    assert len(lines) == 3


def test_gauges_have_the_tags_that_tell_their_lines_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: dict[tuple[str, ...], float] = {}

    class Gauge:
        def __init__(self, name: str, *, description: str, tag_keys: tuple[str, ...]) -> None:
            self.name, self.tag_keys = name, tag_keys

        def set(self, value: float, tags: dict[str, str]) -> None:
            assert tags.keys() == set(self.tag_keys)
            shown[(self.name, *(tags[key] for key in self.tag_keys))] = value

    class Metrics:
        pass

    Metrics.Gauge = Gauge  # type: ignore[attr-defined]
    monkeypatch.setattr(telemetry, "_ray_metrics", lambda: Metrics)
    monkeypatch.setenv("ALIGNREC_RUN", "nightly")
    with Telemetry(tmp_path, "data_prep") as log:
        log.gauge("bad_items", 2, reason="image_missing")
        log.gauge("bad_items", 3, reason="image_empty")
        log.gauge("bytes_per_second", 7.5)
    with Telemetry(tmp_path, "data_prep", enabled=False) as log:
        log.gauge("bad_items", 9, reason="image_missing")
    assert shown == {
        ("alignrec_data_prep_bad_items", "data_prep", "nightly", "image_missing"): 2,
        ("alignrec_data_prep_bad_items", "data_prep", "nightly", "image_empty"): 3,
        ("alignrec_data_prep_bytes_per_second", "data_prep", "nightly"): 7.5,
    }
