"""Versions of a dataset: numbers, links, pruning, and one run at a time."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from alignrec import artifacts
from alignrec.errors import StageFailure, UserError
from data_prep import lock, versions
from data_prep.lock import LOCK, Lock


def write(
    root: Path,
    text: str,
    *,
    keep: int = 5,
    fingerprint: str | None = None,
    work: Callable[[versions.Growing], None] = lambda _: None,
) -> str:
    """Make a version that holds ``text``; return the name of what the output then is."""
    with versions.writing(
        root, root.parent / "out", keep=keep, kind="dataset", fingerprint=fingerprint or text,
        config={}, run="test", say=lambda _: None,
    ) as growing:  # fmt: skip
        (growing.draft.path / "data.txt").write_text(text)
        work(growing)
    assert growing.path is not None
    return growing.path.name


def names(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if not path.name.startswith("."))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "versions"


def test_versions_are_numbered_and_the_output_is_a_link(root: Path) -> None:
    assert write(root, "one") == "000001"
    assert write(root, "two") == "000002"
    assert (root / "latest").readlink() == Path("000002")
    output = root.parent / "out"
    assert output.is_symlink()
    assert artifacts.read(output, "dataset").fingerprint == "two"
    artifacts.verify(output)
    artifacts.verify(root / "000001")
    assert names(root) == ["000001", "000002", "latest"]


def test_nothing_new_makes_no_version(root: Path) -> None:
    assert write(root, "one") == "000001"
    assert write(root, "one") == "000001"
    assert write(root, "one", fingerprint="other settings") == "000002"
    assert write(root, "two", fingerprint="other settings") == "000003"


def test_the_base_is_what_latest_points_at(root: Path) -> None:
    for text in ("one", "two", "three"):
        write(root, text)
    artifacts.point(root / "latest", "000001")  # the user goes back
    with versions.writing(
        root, root.parent / "out", keep=5, kind="dataset", fingerprint="four", config={},
        run="test", say=lambda _: None,
    ) as growing:  # fmt: skip
        assert growing.base == root / "000001"
        assert growing.number == 4


def test_old_versions_are_deleted_but_never_the_latest(root: Path) -> None:
    for text in ("one", "two", "three", "four"):
        write(root, text, keep=2)
    assert names(root) == ["000003", "000004", "latest"]
    artifacts.point(root / "latest", "000003")
    assert versions.prune(root, keep=1) == []
    artifacts.point(root / "latest", "000004")
    assert versions.prune(root, keep=1) == ["000003"]


def test_a_latest_that_leads_nowhere_is_refused(root: Path) -> None:
    write(root, "one")
    (root / "latest").unlink()
    assert versions.latest(root) == root / "000001"
    (root / "latest").symlink_to("000007")
    with pytest.raises(UserError, match="ln -sfn 000001"):
        write(root, "two")
    (root / "latest").unlink()
    (root / "latest").mkdir()
    with pytest.raises(UserError, match="is not a link"):
        write(root, "two")
    assert not (root / LOCK).exists()


def test_an_output_of_a_run_without_versions_gives_way(root: Path) -> None:
    output = root.parent / "out"
    with artifacts.writing(output, kind="dataset", fingerprint="f", config={}, inputs={}) as draft:
        (draft.path / "data.txt").write_text("old")
    write(root, "one")
    assert output.is_symlink()
    assert (output / "data.txt").read_text() == "one"
    with artifacts.writing(output, kind="dataset", fingerprint="f", config={}, inputs={}) as draft:
        (draft.path / "data.txt").write_text("without versions again")
    assert not output.is_symlink()
    assert (root / "000001" / "data.txt").read_text() == "one"
    assert sorted(p.name for p in root.parent.iterdir()) == ["out", "versions"]


def test_a_failed_run_leaves_its_draft_and_no_lock(root: Path) -> None:
    write(root, "one")

    def fail(growing: versions.Growing) -> None:
        (growing.draft.work / "position").write_text("7")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write(root, "two", work=fail)
    assert names(root) == ["000001", "000002.partial", "latest"]
    with versions.writing(
        root, root.parent / "out", keep=5, kind="dataset", fingerprint="two", config={},
        run="test", say=lambda _: None,
    ) as growing:  # fmt: skip
        assert (growing.draft.work / "position").read_text() == "7"


@pytest.fixture
def other_process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def leave_lock(root: Path, **changes: Any) -> None:
    """Write the lock of another run; ``changes`` are over those of this process."""
    (root / LOCK).unlink(missing_ok=True)
    with Lock(root, run="nightly"):
        entry = json.loads((root / LOCK).read_text())
    (root / LOCK).write_text(json.dumps(entry | {"token": "another"} | changes))


def test_the_second_run_is_told_who_holds_the_lock(root: Path) -> None:
    with Lock(root, run="nightly"), pytest.raises(StageFailure) as refused:
        write(root, "one")
    message = str(refused.value)
    for part in ("the run nightly", f"process {os.getpid()}", socket.gethostname(), "since 20"):
        assert part in message
    assert "\n" not in message
    write(root, "one")


def test_a_dead_process_of_this_host_loses_the_lock(
    root: Path, other_process: subprocess.Popen[bytes]
) -> None:
    start = lock._process_start(other_process.pid)
    leave_lock(root, pid=other_process.pid, process_start=start)
    with pytest.raises(StageFailure, match=f"process {other_process.pid}"):
        write(root, "one")
    leave_lock(
        root, pid=other_process.pid, process_start="1"
    )  # the number is another process's now
    assert write(root, "one") == "000001"
    leave_lock(root, pid=other_process.pid, process_start=start)
    other_process.kill()
    other_process.wait()
    assert write(root, "two") == "000002"


def test_a_process_of_another_host_is_respected_until_its_heart_stands_still(root: Path) -> None:
    leave_lock(root, host="elsewhere", place=["elsewhere", "boot", "pid:[1]"], pid=1)
    with pytest.raises(StageFailure, match=r"on elsewhere.*taken over 120 s after"):
        write(root, "one")
    os.utime(root / LOCK, times=(0, (root / LOCK).stat().st_mtime - 119))
    with pytest.raises(StageFailure, match="elsewhere"):
        write(root, "one")
    os.utime(root / LOCK, times=(0, (root / LOCK).stat().st_mtime - 3))
    assert write(root, "one") == "000001"


def test_a_torn_lock_counts_as_one_of_another_host(root: Path) -> None:
    leave_lock(root)
    (root / LOCK).write_text('{"pid": 1')
    with pytest.raises(StageFailure, match="did not say its name"):
        write(root, "one")
    os.utime(root / LOCK, times=(0, 0))
    assert write(root, "one") == "000001"


def test_a_run_that_lost_its_lock_publishes_nothing(root: Path) -> None:
    write(root, "one")

    def lose(_: versions.Growing) -> None:
        entry = json.loads((root / LOCK).read_text())
        (root / LOCK).write_text(json.dumps(entry | {"token": "another", "run": "other"}))

    with pytest.raises(StageFailure, match="taken over by the run other"):
        write(root, "two", work=lose)
    assert versions.numbers(root) == [1]
    assert (root / LOCK).exists()


def test_a_lock_that_is_lost_while_checksums_are_made_releases_nothing(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root, "one")
    complete = artifacts.complete

    def lose(*words: Any, **named: Any) -> None:
        complete(*words, **named)
        entry = json.loads((root / LOCK).read_text())
        (root / LOCK).write_text(json.dumps(entry | {"token": "another", "run": "other"}))

    monkeypatch.setattr(artifacts, "complete", lose)
    with pytest.raises(StageFailure, match="taken over by the run other"):
        write(root, "two")
    versions.recover(root)
    assert versions.numbers(root) == [1]
    assert (root / "latest").readlink() == Path("000001")


def test_storage_that_is_away_for_a_moment_ends_neither_heart_nor_run(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults: list[int] = []
    original = lock._read

    def read(path: Path) -> dict[str, Any] | None:
        if faults:
            raise OSError(faults.pop(), "away")
        return original(path)

    monkeypatch.setattr(lock, "_read", read)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    monkeypatch.setattr(lock, "_READ_PAUSE_SECONDS", 0.0)
    with Lock(root, run="r") as held:
        faults += [errno.EIO, errno.ESTALE]
        assert until(held, lambda: not faults)  # the heart met them
        os.utime(root / LOCK, times=(0, 0))
        assert until(held, lambda: (root / LOCK).stat().st_mtime > 0)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 1000.0)
    with Lock(root, run="r") as held:
        faults += [errno.EIO, errno.ESTALE]
        held.check()
        faults += [errno.EIO] * 5
        with pytest.raises(StageFailure, match=r"lock cannot be read \(away\)"):
            held.check()


def test_a_full_storage_is_no_mistake_of_the_user(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(StageFailure, match=r"versions cannot be written \(no space left\)"):
        write(root, "one")


def until(held: Lock, is_so: Callable[[], bool]) -> bool:
    """Wait for the heart at most ten seconds."""
    for _ in range(1000):
        if is_so():
            return True
        held._ended.wait(0.01)
    return False


def test_the_heart_beats(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.01)
    with Lock(root, run="r") as held:
        os.utime(root / LOCK, times=(0, 0))
        assert until(held, lambda: (root / LOCK).stat().st_mtime > 0)


def test_a_folder_that_cannot_be_made_is_the_users_mistake(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"versions\.root=.*cannot be written"):
        write(tmp_path / "file" / "root", "one")
