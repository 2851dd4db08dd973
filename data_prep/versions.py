"""A dataset that grows: a folder of versions, its lock, ``latest``, and the output's link.

``root/<number>/`` are finished artifacts, ``root/latest`` a relative link to one of them, and
``root/lock`` is held by the run that makes the next one. Every step is a rename, so a kill between
any two of them leaves a state that the next run completes (preparation -> artifact folders).
"""

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from alignrec import artifacts
from alignrec.artifacts import Draft, Manifest
from alignrec.configuration import digest
from alignrec.errors import StageFailure, UserError
from data_prep.lock import Lock

LATEST = "latest"
_DIGITS = 6
_DOOMED = ".pruned"

Say = Callable[[str], None]


@dataclasses.dataclass
class Growing:
    """A version being made.

    Attributes:
        draft: where its files go.
        base: the finished version that it continues; None for the first.
        number: of the new version.
        path: the version that the output is at the end: ``base`` when nothing had changed.
    """

    draft: Draft
    base: Path | None
    number: int
    path: Path | None = None


@contextlib.contextmanager
def writing(
    root: Path,
    output: Path,
    *,
    keep: int,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    run: str,
    say: Say,
) -> Iterator[Growing]:
    """Make the next version of a dataset and point ``latest`` and ``output`` at it.

    When the block ends with the files and the fingerprint of the version before, no version is
    added and ``output`` becomes a link to that one.

    Args:
        root: folder of the versions.
        output: the stage's output, which becomes a link.
        keep: finished versions that stay, the new one included.
        kind: of the artifact.
        fingerprint: what the version will carry.
        config: the stage's resolved configuration.
        run: name by which another run is told who holds the lock.
        say: tells the person who watches.

    Raises:
        UserError: another run holds the root, or it cannot be used.
        StageFailure: the lock was taken over meanwhile.
    """
    with Lock(root, run=run) as lock:
        recover(root)
        base = latest(root)
        number = max(numbers(root), default=0) + 1
        version = root / f"{number:0{_DIGITS}d}"
        before = "" if base is None else artifacts.read(base, kind).identity
        # What a killed run left is only of use where it began from the same version.
        draft = artifacts.open_draft(version, fingerprint=digest([fingerprint, str(base), before]))
        growing = Growing(draft, base, number)
        yield growing
        lock.check()
        artifacts.complete(draft, kind=kind, fingerprint=fingerprint, config=config, inputs={})
        try:
            lock.check()  # reading all files for their checksums may have taken long
        except StageFailure:
            (draft.path / artifacts.MANIFEST).unlink(missing_ok=True)  # or it would be released
            raise
        growing.path = _release(draft.path, root)
        lock.check()
        artifacts.point(output, growing.path.resolve())
        if growing.path != version:
            say(f"nothing changed since version {growing.path.name}: no version is added")
        for name in prune(root, keep=keep):
            say(f"version {name} is deleted (versions.keep: {keep})")


def recover(root: Path) -> None:
    """Complete what a killed run left between the manifest of a version and its end."""
    for path in sorted(root.glob("*" + _DOOMED)):
        shutil.rmtree(path, ignore_errors=True)
    for path in sorted(root.glob(".*.writing")):
        path.unlink(missing_ok=True)
    finished = numbers(root)
    for draft in sorted(root.glob("*.partial")):
        if not _is_number(draft.stem):
            continue
        if (draft / artifacts.MANIFEST).exists():
            _release(draft, root)
        elif finished and int(draft.stem) <= finished[-1]:
            shutil.rmtree(draft, ignore_errors=True)  # a worker that outlived its run
    for number in numbers(root):
        version = root / f"{number:0{_DIGITS}d}"
        if artifacts.is_unsettled(version):
            _make_latest(version)


def numbers(root: Path) -> list[int]:
    """Return the numbers of the finished versions, ascending."""
    return sorted(
        int(path.name)
        for path in root.iterdir()
        if _is_number(path.name) and (path / artifacts.MANIFEST).is_file()
    )


def latest(root: Path) -> Path | None:
    """Return the version that the next one continues; None when there is none.

    Raises:
        UserError: ``latest`` is no link to a version.
    """
    link = root / LATEST
    finished = numbers(root)
    if link.is_symlink():
        name = link.readlink().name
        if _is_number(name) and int(name) in finished:
            return root / name
        if not finished:
            return None
        raise UserError(
            f"{link} points at {name}, which is no finished version in {root}: numbers of items "
            f"would not continue. Point it at one (ln -sfn {finished[-1]:0{_DIGITS}d} {link})."
        )
    if link.exists():
        raise UserError(
            f"{link} is not a link, so it does not say which version is the latest. Delete it, or "
            f"make it a link to a version."
        )
    return root / f"{finished[-1]:0{_DIGITS}d}" if finished else None


def prune(root: Path, *, keep: int) -> list[str]:
    """Delete the finished versions before the last ``keep``, but never ``latest``."""
    current = latest(root)
    doomed = [
        root / f"{number:0{_DIGITS}d}"
        for number in numbers(root)[:-keep]
        if current is None or number != int(current.name)
    ]
    for version in doomed:
        gone = version.with_name(version.name + _DOOMED)
        version.rename(gone)  # a half deleted version must not look like a whole one
        shutil.rmtree(gone, ignore_errors=True)
    return [version.name for version in doomed]


def _release(draft: Path, root: Path) -> Path:
    """Make a complete draft the latest version; return the version that now holds its content."""
    base = latest(root)
    if base is not None and _says_the_same(artifacts.read(draft), artifacts.read(base)):
        gone = draft.with_name(draft.stem + _DOOMED)
        draft.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return base
    version = root / draft.stem
    artifacts.place(draft, version)
    _make_latest(version)
    return version


def _make_latest(version: Path) -> None:
    """Move ``latest`` first: until a version is settled, the next run knows that it must."""
    artifacts.point(version.with_name(LATEST), version.name)
    artifacts.settle(version)


def _says_the_same(one: Manifest, other: Manifest) -> bool:
    return (one.files, one.fingerprint) == (other.files, other.fingerprint)


def _is_number(name: str) -> bool:
    return len(name) >= _DIGITS and name.isdecimal()
