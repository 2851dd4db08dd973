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
