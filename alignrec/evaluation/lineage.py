"""Where a result came from: the artifacts behind it, by their manifests (-> report)."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from alignrec import artifacts
from alignrec.artifacts import Manifest
from alignrec.errors import UserError

_COUNT_WORDS = {
    "num_items": "items",
    "num_users": "users",
    "num_train": "training interactions",
    "num_valid": "validation interactions",
    "num_test": "test interactions",
}
_ORDER = ("dataset", "encoder", "features", "graph", "embeddings")


@dataclasses.dataclass(frozen=True)
class Step:
    """One artifact on the way; without a manifest when its folder is no longer there."""

    name: str
    kind: str
    identity: str
    manifest: Manifest | None

    @property
    def counts(self) -> dict[str, int]:
        """Counts of the artifact, with words instead of underscores."""
        return in_words(self.manifest.counts if self.manifest else {})


def trace(inputs: Mapping[str, Path]) -> list[Step]:
    """Return every artifact behind ``inputs``, each once, sources before what was made of them."""
    steps: dict[str, Step] = {}

    def visit(name: str, path: Path, identity: str) -> None:
        if identity in steps:
            return
        manifest = _manifest(path, identity)
        kind = manifest.kind if manifest else name
        steps[identity] = Step(path.name, kind, identity[:12], manifest)
        for parent, source in (manifest.inputs if manifest else {}).items():
            visit(parent, Path(source["path"]), source["identity"])

    for name, path in inputs.items():
        visit(name, path, artifacts.read(path).identity)
    return sorted(steps.values(), key=lambda s: (_place(s.kind), s.name != "align", s.name))


def in_words(counts: Mapping[str, int]) -> dict[str, int]:
    """Return counts named e.g. "without image" for num_without_image; the main ones first."""
    first = list(_COUNT_WORDS)
    names = sorted(counts, key=lambda n: first.index(n) if n in first else len(first))
    plain = {name: name.removeprefix("num_").replace("_", " ") for name in names}
    return {_COUNT_WORDS.get(name, plain[name]): counts[name] for name in names}


def _manifest(path: Path, identity: str) -> Manifest | None:
    try:
        manifest = artifacts.read(path)
    except UserError:
        return None  # moved or deleted since: the page names it without its counts
    return manifest if manifest.identity == identity else None


def _place(kind: str) -> int:
    return _ORDER.index(kind) if kind in _ORDER else len(_ORDER)
