"""Artifact folders between stages: files plus a ``manifest.json`` that is written last.

A stage writes into ``<output>.partial`` and renames it to ``<output>`` when it is complete. A
folder without a manifest is therefore unfinished, and a partial folder of the same fingerprint is
what a killed stage resumes from.
"""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import alignrec
from alignrec.configuration import digest
from alignrec.errors import StageFailure, UserError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
WORK = "work"
_FINGERPRINT = "fingerprint.json"
_WRITING = ".writing"
_PACKAGES = ("torch", "ray", "deepspeed", "torch-geometric", "numpy", "pyarrow", "webdataset")


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact folder holds and where it came from.

    Attributes:
        kind: dataset, encoder, features, graph, embeddings, metrics or bundle.
        fingerprint: digest of everything that decides the content: stage version, the settings
            that affect the result, and the inputs' identities. Equal fingerprints, equal results.
        identity: digest of the files' checksums, but for those that only say how the content came
            about: what a later stage's fingerprint refers to.
        config: the resolved configuration of the stage.
        inputs: name of each input -> its path and identity.
        counts: e.g. num_items, num_users, num_quarantined.
        files: path in the folder -> size in bytes and SHA-256.
        facts: other results worth keeping beside the files (plain JSON).
    """

    kind: str
    fingerprint: str
    identity: str
    config: dict[str, Any]
    inputs: dict[str, dict[str, str]]
    counts: dict[str, int]
    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]
    producer: dict[str, Any]
    created: str
    schema_version: int = SCHEMA_VERSION


@dataclasses.dataclass
class Draft:
    """An artifact being written: put files below ``path``, fill in ``counts`` and ``facts``.

    Files below ``path / "work"`` (checkpoints, logs of a resumable stage) are dropped at the end.

    Attributes:
        checksums: path in the folder -> {"bytes", "sha256"} of files that were hashed while they
            were written or that are links to files of a finished artifact: not read again.
        provenance: paths of files that say how the content came about and are not content: two
            artifacts that differ in them alone have one identity.
    """

    path: Path
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    checksums: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    provenance: set[str] = dataclasses.field(default_factory=set)

    @property
    def work(self) -> Path:
        """Folder for what must survive a kill but not the end of the stage."""
        folder = self.path / WORK
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def fingerprint(
    stage: str, version: int, settings: Mapping[str, Any], inputs: Mapping[str, str]
) -> str:
    """Return the digest that decides whether a finished artifact can be reused.

    Args:
        stage: name of the stage.
        version: raised by us whenever the stage's code would compute something else.
        settings: the settings that affect the result.
        inputs: name of each input -> its identity.
    """
    return digest(
        {
            "schema": SCHEMA_VERSION,
            "stage": stage,
            "version": version,
            "settings": settings,
            "inputs": dict(sorted(inputs.items())),
        }
    )


def partial_path(output: Path) -> Path:
    """Return the folder in which the artifact ``output`` is prepared."""
    return output.with_name(output.name + ".partial")


def open_draft(output: Path, *, fingerprint: str) -> Draft:
    """Return the draft of ``output``, keeping what a killed run of the same fingerprint left.

    A draft of another fingerprint is discarded. One that was complete is unfinished again, because
    its files may be rewritten: ``recover`` before, to keep it. Call it on rank 0 only; other ranks
    use ``Draft(partial_path(output))`` after a barrier.
    """
    folder = partial_path(output)
    mark = folder / _FINGERPRINT
    if folder.exists():
        try:
            left = json.loads(mark.read_text())["fingerprint"]
        except (OSError, ValueError, KeyError):
            left = None
        if left != fingerprint:
            mark.unlink(missing_ok=True)  # half deleted it must not look like one to continue
            shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_json(mark, {"fingerprint": fingerprint})
    return Draft(folder)


def recover(output: Path) -> None:
    """Finish an artifact whose stage was killed between its manifest and the end."""
    draft = partial_path(output)
    if (draft / MANIFEST).exists():
        place(draft, output)
    if is_unsettled(output):
        settle(output)


def publish(
    draft: Draft,
    output: Path,
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
) -> Manifest:
    """Write the manifest of a complete draft and move it to ``output`` by rename."""
    manifest = complete(draft, kind=kind, fingerprint=fingerprint, config=config, inputs=inputs)
    place(draft.path, output)
    settle(output)
    return manifest


def complete(
    draft: Draft,
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
) -> Manifest:
    """Write the manifest of a draft: from now on it is an artifact, at the draft's place.

    Raises:
        StageFailure: a file of ``draft.checksums`` is not there.
    """
    files = checksums(draft.path, known=draft.checksums)
    lost = sorted(draft.checksums.keys() - files.keys())
    if lost:
        raise StageFailure(
            f"{draft.path / lost[0]} was written and is gone ({len(lost)} such files): the {kind} "
            f"would be incomplete. Nothing was published. Find out who deletes files there, delete "
            f"{draft.path} and run the same command again."
        )
    sources = {name: read(path) for name, path in inputs.items()}
    manifest = Manifest(
        kind=kind,
        fingerprint=fingerprint,
        identity=digest(
            {name: entry["sha256"] for name, entry in files.items() if name not in draft.provenance}
        ),
        config=dict(config),
        inputs={
            name: {"path": str(inputs[name]), "identity": source.identity}
            for name, source in sources.items()
        },
        counts=dict(draft.counts),
        files=files,
        facts=dict(draft.facts),
        producer=producer(),
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )
    # Until the manifest is there a kill loses nothing; from then on nothing but the rename is left.
    write_json(draft.path / MANIFEST, dataclasses.asdict(manifest))
    return manifest


def place(draft: Path, output: Path) -> None:
    """Rename a draft with its manifest to ``output``; what was there is deleted."""
    old = output.with_name(output.name + ".old")
    _remove(old)
    if os.path.lexists(output):
        output.rename(old)
    draft.rename(output)
    _remove(old)


def is_unsettled(output: Path) -> bool:
    """Say whether an artifact at its place still has what only a draft needs."""
    return (output / MANIFEST).exists() and (output / _FINGERPRINT).exists()


def settle(output: Path) -> None:
    """Drop what only a draft needs; its mark goes last, so that a killed call is made again."""
    shutil.rmtree(output / WORK, ignore_errors=True)
    for stray in output.rglob(f".*{_WRITING}"):
        stray.unlink(missing_ok=True)
    (output / _FINGERPRINT).unlink(missing_ok=True)


def point(link: Path, target: str | Path) -> None:
    """Make ``link`` a symbolic link to ``target`` by rename; what was there is deleted."""
    spare = link.with_name(f".{link.name}{_WRITING}")
    spare.unlink(missing_ok=True)  # of a call that was killed
    spare.symlink_to(target)
    if link.is_dir() and not link.is_symlink():
        place(spare, link)
    else:
        spare.replace(link)


@contextlib.contextmanager
def writing(
    output: Path,
    *,
    kind: str,
    fingerprint: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Path],
) -> Iterator[Draft]:
    """Open a draft of ``output`` and publish it when the block ends without an exception."""
    draft = open_draft(output, fingerprint=fingerprint)
    yield draft
    publish(draft, output, kind=kind, fingerprint=fingerprint, config=config, inputs=inputs)


def finished(output: Path) -> Manifest | None:
    """Return the manifest of what lies at a stage's output; None where nothing is finished."""
    return read(output) if (output / MANIFEST).is_file() else None


def is_being_placed(output: Path) -> bool:
    """Say whether a finished artifact is on its way to ``output``, where none is at the moment."""
    if (output / MANIFEST).is_file():
        return False
    spares = (partial_path(output), output.with_name(output.name + ".old"))
    return any((spare / MANIFEST).is_file() for spare in spares)


def read(path: Path, kind: str | None = None) -> Manifest:
    """Read the manifest of a finished artifact.

    Raises:
        UserError: the folder is absent, unfinished, of another kind or from a newer version.
    """
    manifest_path = path / MANIFEST
    wanted = kind or "artifact"
    if not manifest_path.is_file():
        unfinished = path.exists() or partial_path(path).exists()
        raise UserError(
            f"{path}: the {wanted} is unfinished (no {MANIFEST}): its stage was stopped before the "
            f"end. Run that stage again; it resumes."
            if unfinished
            else f"{path}: no {wanted} here. Run the stage that writes it, or correct the path."
        )
    try:
        content = json.loads(manifest_path.read_text())
        version = int(content["schema_version"])
        if version > SCHEMA_VERSION:
            raise UserError(
                f"{path} was written by a newer alignrec (schema {version}, this one reads up to "
                f"{SCHEMA_VERSION}). Upgrade alignrec or write the artifact again."
            )
        manifest = Manifest(**content)
    except UserError:
        raise
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{manifest_path} is damaged ({error}). Delete {path} and run its stage again."
        ) from error
    if kind is not None and manifest.kind != kind:
        raise UserError(
            f"{path} is of kind {manifest.kind}, but {kind} is needed here. Correct the path."
        )
    return manifest


def verify(path: Path) -> Manifest:
    """Read an artifact's manifest and check every file against its checksum.

    Raises:
        UserError: a file is missing, added or altered.
    """
    manifest = read(path)
    found = checksums(path)
    for name in sorted(manifest.files.keys() | found.keys()):
        if manifest.files.get(name, {}).get("sha256") != found.get(name, {}).get("sha256"):
            state = "missing" if name not in found else "altered or added"
            raise UserError(
                f"{path / name} is {state} since the artifact was written, so results would not "
                f"be what the manifest says. Delete {path} and run its stage again."
            )
    return manifest


def checksums(
    folder: Path, *, known: Mapping[str, dict[str, Any]] | None = None
) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of an artifact, by relative path.

    The manifest does not count, nor what belongs to an unfinished draft alone.

    Args:
        folder: the artifact.
        known: entries that are right already: such a file is read only if its size is another.
    """
    result = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in (MANIFEST, _FINGERPRINT) or name.startswith(f"{WORK}/"):
            continue
        if name.endswith(_WRITING):
            continue
        size = path.stat().st_size
        if known and known.get(name, {}).get("bytes") == size:
            result[name] = dict(known[name])
            continue
        result[name] = checksum(path)
    return result


def checksum(path: Path) -> dict[str, Any]:
    """Return the size of a file in bytes and its SHA-256."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": sha256}


def write_json(path: Path, value: Any) -> None:  # noqa: ANN401 - any JSON value
    """Write JSON so that a reader sees the old file or the whole new one, even after a crash."""
    spare = path.with_name(f".{path.name}.{os.getpid()}{_WRITING}")
    with spare.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, sort_keys=True, default=str)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    spare.replace(path)


def producer() -> dict[str, Any]:
    """Return version, commit, Python and package versions of the running program."""
    return {
        "alignrec": alignrec.__version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "packages": _versions(_PACKAGES),
    }


def _versions(packages: Iterable[str]) -> dict[str, str]:
    versions = {}
    for package in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _commit() -> str | None:
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return os.environ.get("ALIGNREC_COMMIT")  # a job's copy of the code has no history
    try:
        result = subprocess.run(  # noqa: S603 - fixed words
            ["git", "-C", str(root), "rev-parse", "HEAD"],  # noqa: S607 - git from the PATH
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()


def _remove(path: Path) -> None:
    """Delete a folder, a file or a link, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
