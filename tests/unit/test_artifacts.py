import json
import shutil
from pathlib import Path

import pytest

from alignrec import artifacts
from alignrec.errors import StageFailure, UserError


def make(
    folder: Path, text: str = "x", fingerprint: str = "f", **inputs: Path
) -> artifacts.Manifest:
    with artifacts.writing(
        folder, kind="features", fingerprint=fingerprint, config={"a": 1}, inputs=inputs
    ) as draft:
        (draft.path / "data.txt").write_text(text)
        (draft.work / "checkpoint").write_text("not kept")
        draft.counts["num_items"] = 3
    return artifacts.read(folder, "features")


def test_a_finished_artifact_has_checksums_counts_and_lineage(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    manifest = make(tmp_path / "out", source=tmp_path / "source")
    assert manifest.counts == {"num_items": 3}
    assert list(manifest.files) == ["data.txt"]
    assert manifest.inputs["source"]["identity"] == source.identity
    assert manifest.producer["packages"]["torch"]
    assert not artifacts.partial_path(tmp_path / "out").exists()
    artifacts.verify(tmp_path / "out")


def test_identity_is_content_not_place_or_time(tmp_path: Path) -> None:
    assert make(tmp_path / "a").identity == make(tmp_path / "b").identity
    assert make(tmp_path / "a", "y").identity != make(tmp_path / "b").identity


def test_an_interrupted_draft_is_unfinished_and_is_continued(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def begin(fingerprint: str) -> None:
        with artifacts.writing(
            tmp_path / "out", kind="features", fingerprint=fingerprint, config={}, inputs={}
        ) as draft:
            seen.append((draft.work / "position").exists())
            (draft.work / "position").write_text("7")
            raise Stop

    seen: list[bool] = []
    for fingerprint in ("f", "f", "g"):
        with pytest.raises(Stop):
            begin(fingerprint)
    assert seen == [False, True, False]  # another fingerprint starts afresh
    with pytest.raises(UserError, match="unfinished"):
        artifacts.read(tmp_path / "out")


def test_a_failed_rewrite_leaves_the_old_artifact(tmp_path: Path) -> None:
    make(tmp_path / "out", "old")
    with (
        pytest.raises(ZeroDivisionError),
        artifacts.writing(tmp_path / "out", kind="features", fingerprint="g", config={}, inputs={}),
    ):
        raise ZeroDivisionError
    assert (tmp_path / "out" / "data.txt").read_text() == "old"
    make(tmp_path / "out", "new")
    assert (tmp_path / "out" / "data.txt").read_text() == "new"


def test_absent_wrong_kind_damaged_and_newer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset here"):
        artifacts.read(tmp_path / "none", "dataset")
    make(tmp_path / "out")
    with pytest.raises(UserError, match="kind features, but dataset is needed"):
        artifacts.read(tmp_path / "out", "dataset")
    path = tmp_path / "out" / artifacts.MANIFEST
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"schema_version": 99, "later": 1}))
    with pytest.raises(UserError, match="newer alignrec"):
        artifacts.read(tmp_path / "out")
    path.write_text(path.read_text()[:40])
    with pytest.raises(UserError, match="damaged"):
        artifacts.read(tmp_path / "out")


@pytest.mark.parametrize("change", ["alter", "remove", "add"])
def test_verify_names_the_file_that_changed(tmp_path: Path, change: str) -> None:
    make(tmp_path / "out")
    name = "other.txt" if change == "add" else "data.txt"
    if change == "remove":
        (tmp_path / "out" / name).unlink()
    else:
        (tmp_path / "out" / name).write_text("z")
    with pytest.raises(UserError, match=name):
        artifacts.verify(tmp_path / "out")


def test_fingerprint_depends_on_everything_that_decides_the_result() -> None:
    base = artifacts.fingerprint("align", 1, {"a": 1}, {"graph": "x"})
    assert base == artifacts.fingerprint("align", 1, {"a": 1}, {"graph": "x"})
    others = {
        artifacts.fingerprint("align", 2, {"a": 1}, {"graph": "x"}),
        artifacts.fingerprint("align", 1, {"a": 2}, {"graph": "x"}),
        artifacts.fingerprint("align", 1, {"a": 1}, {"graph": "y"}),
        artifacts.fingerprint("ablation", 1, {"a": 1}, {"graph": "x"}),
    }
    assert len(others | {base}) == 5


@pytest.mark.parametrize("moment", ["checksums", "rename"])
def test_a_kill_while_publishing_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    name = {"checksums": "checksums", "rename": "place"}[moment]
    monkeypatch.setattr(artifacts, name, kill)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "out")
    monkeypatch.undo()
    (artifacts.partial_path(tmp_path / "out") / ".torn.123.writing").write_text("torn")
    artifacts.recover(tmp_path / "out")
    if moment == "rename":  # the manifest was there: nothing but the rename was left
        artifacts.verify(tmp_path / "out")
    else:
        draft = artifacts.open_draft(tmp_path / "out", fingerprint="f")
        assert (draft.work / "checkpoint").exists()
        assert list(make(tmp_path / "out").files) == ["data.txt"]


def test_known_checksums_are_not_computed_again_while_the_size_is_right(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("aaa")
    (tmp_path / "b").write_text("bbb")
    known = {"a": {"bytes": 3, "sha256": "told"}, "b": {"bytes": 4, "sha256": "told"}}
    found = artifacts.checksums(tmp_path, known=known)
    assert found["a"] == known["a"]
    assert found["b"] == artifacts.checksums(tmp_path)["b"]


def test_a_file_that_was_written_and_is_gone_is_not_published(tmp_path: Path) -> None:
    def write() -> None:
        with artifacts.writing(
            tmp_path / "out", kind="dataset", fingerprint="f", config={}, inputs={}
        ) as draft:
            draft.checksums["shards/a.tar"] = {"bytes": 1, "sha256": "0"}

    with pytest.raises(StageFailure, match=r"shards/a\.tar was written and is gone"):
        write()
    assert not (artifacts.partial_path(tmp_path / "out") / artifacts.MANIFEST).exists()


def test_a_draft_that_is_half_deleted_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(folder: Path) -> None:
        (folder / "work" / "first").unlink()
        raise KeyboardInterrupt

    draft = artifacts.open_draft(tmp_path / "out", fingerprint="f")
    for name in ("first", "second"):
        (draft.work / name).write_text("")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            artifacts.open_draft(tmp_path / "out", fingerprint="g")
    draft = artifacts.open_draft(tmp_path / "out", fingerprint="f")
    assert not list(draft.work.iterdir())


def test_provenance_is_checked_but_is_no_part_of_the_identity(tmp_path: Path) -> None:
    def identity(name: str, provenance: str) -> str:
        with artifacts.writing(
            tmp_path / name, kind="dataset", fingerprint="f", config={}, inputs={}
        ) as draft:
            (draft.path / "data").write_text("x")
            (draft.path / "sources").write_text(provenance)
            draft.provenance.add("sources")
        return artifacts.verify(tmp_path / name).identity

    assert identity("a", "1") == identity("b", "2")
    (tmp_path / "a" / "sources").write_text("3")
    with pytest.raises(UserError, match="altered"):
        artifacts.verify(tmp_path / "a")


def test_what_only_a_draft_needs_is_dropped_after_a_kill_too(tmp_path: Path) -> None:
    manifest = make(tmp_path / "out")
    (tmp_path / "out" / artifacts.WORK).mkdir()
    artifacts.write_json(tmp_path / "out" / "fingerprint.json", {"fingerprint": "f"})
    artifacts.recover(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["data.txt", "manifest.json"]
    assert artifacts.verify(tmp_path / "out") == manifest


def test_a_link_replaces_a_link_a_folder_or_nothing(tmp_path: Path) -> None:
    make(tmp_path / "one", "1")
    make(tmp_path / "two", "2")
    link = tmp_path / "link"
    for target in ("one", "two", "absent", "one"):
        artifacts.point(link, target)
        assert link.readlink() == Path(target)
    link.unlink()
    make(link, "a folder")
    artifacts.point(link, "two")
    assert (link / "data.txt").read_text() == "2"
    make(link, "a folder again")  # the artifact behind the link stays
    assert (tmp_path / "two" / "data.txt").read_text() == "2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "one", "two"]


def test_a_complete_draft_that_is_opened_again_is_unfinished(tmp_path: Path) -> None:
    output = tmp_path / "out"
    draft = artifacts.open_draft(output, fingerprint="f")
    (draft.path / "data.txt").write_text("whole")
    artifacts.complete(draft, kind="features", fingerprint="f", config={}, inputs={})
    assert artifacts.is_being_placed(output)
    again = artifacts.open_draft(output, fingerprint="f")
    (again.path / "data.txt").write_text("ha")  # killed while it writes
    artifacts.recover(output)
    assert artifacts.finished(output) is None
    assert not artifacts.is_being_placed(output)
