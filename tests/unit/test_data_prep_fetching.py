"""Pictures' bytes: from below the root or allowed addresses only, in bounded time and size."""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data_prep import fetching
from data_prep.fetching import Fetcher
from data_prep.images import BadImage, ImageRules
from data_prep.quarantine import Reason

CONTENT = bytes(range(256)) * 4
RULES = ImageRules(
    root="/", allowed_schemes=(), max_side=64, min_side=4, jpeg_quality=90,
    max_bytes=200_000, max_pixels=1_000_000,
)  # fmt: skip


def read(reference: str, rules: ImageRules) -> bytes:
    with Fetcher(rules) as fetcher:
        return fetcher.read(reference)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "sub").mkdir(parents=True)
    (tmp_path / "secret.jpg").write_bytes(CONTENT)
    (tmp_path / "root" / "good.jpg").write_bytes(CONTENT)
    (tmp_path / "root" / "sub" / "odd name #1%.jpg").write_bytes(CONTENT)
    (tmp_path / "root" / "empty.jpg").write_bytes(b"")
    (tmp_path / "root" / "large.jpg").write_bytes(bytes(200_001))
    os.mkfifo(tmp_path / "root" / "pipe.jpg")
    return tmp_path / "root"


def rules_at(root: Path, **changes: Any) -> ImageRules:
    return ImageRules(**{**vars(RULES), "root": str(root), **changes})


@pytest.mark.parametrize("name", ["good.jpg", "sub/../good.jpg", "sub/odd name #1%.jpg"])
def test_files_below_the_root_are_read(root: Path, name: str) -> None:
    assert read(name, rules_at(root)) == CONTENT
    assert read(str(root / name), rules_at(root)) == CONTENT


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("absent.jpg", Reason.IMAGE_MISSING),
        ("sub/absent.jpg", Reason.IMAGE_MISSING),
        ("../secret.jpg", Reason.IMAGE_FORBIDDEN),
        ("sub/../../secret.jpg", Reason.IMAGE_FORBIDDEN),
        ("/etc/passwd", Reason.IMAGE_FORBIDDEN),
        ("http://127.0.0.1/x.jpg", Reason.IMAGE_FORBIDDEN),
        ("file:///etc/passwd", Reason.IMAGE_FORBIDDEN),
        ("simplecache::file:///etc/passwd", Reason.IMAGE_FORBIDDEN),
        ("a\x00b.jpg", Reason.IMAGE_FORBIDDEN),
        ("x" * 5000, Reason.IMAGE_UNREADABLE),
        ("sub", Reason.IMAGE_UNREADABLE),
        ("good.jpg/inside", Reason.IMAGE_UNREADABLE),
        ("pipe.jpg", Reason.IMAGE_UNREADABLE),
        ("empty.jpg", Reason.IMAGE_EMPTY),
        ("large.jpg", Reason.IMAGE_TOO_LARGE),
    ],
)
def test_bad_references_are_refused_with_their_reason(
    root: Path, reference: str, reason: Reason
) -> None:
    with pytest.raises(BadImage) as caught:
        read(reference, rules_at(root))
    assert caught.value.reason == reason


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_links_are_followed_below_the_root_only(root: Path, tmp_path: Path, scheme: str) -> None:
    (root / "inside.jpg").symlink_to(root / "good.jpg")
    (root / "up_and_down.jpg").symlink_to(Path("..", root.name, "good.jpg"))
    (root / "folder").symlink_to("sub")
    (root / "out.jpg").symlink_to(tmp_path / "secret.jpg")
    (root / "nothing.jpg").symlink_to(tmp_path / "absent.jpg")
    (root / "out").symlink_to("..")
    (tmp_path / "rooted").mkdir()
    (root / "beside").symlink_to(tmp_path / "rooted")
    (tmp_path / "link").symlink_to(root)
    for start in (root, tmp_path / "link"):
        given = ImageRules(**{**vars(RULES), "root": f"{scheme}{start}"})
        for name in ("inside.jpg", "up_and_down.jpg", "folder/odd name #1%.jpg"):
            assert read(name, given) == CONTENT
        for name in ("out.jpg", "nothing.jpg", "out/secret.jpg", "beside", "sub/../out/x/y.jpg"):
            with pytest.raises(BadImage, match="is a link that leads out of") as caught:
                read(name, given)
            assert caught.value.reason == Reason.IMAGE_FORBIDDEN
            assert fetching.source_state(name, given) == fetching.FORBIDDEN
    assert read(f"{root}/out/secret.jpg", rules_at(Path("/"))) == CONTENT  # all is below the root


def test_an_allowed_scheme_is_read(root: Path) -> None:
    url = (root / "good.jpg").as_uri()
    assert read(url, rules_at(root, allowed_schemes=("file",))) == CONTENT


def test_a_root_may_be_a_url() -> None:
    rules = rules_at("s3://bucket/pictures")
    assert fetching.resolve("a/b.jpg", rules) == "s3://bucket/pictures/a/b.jpg"
    with pytest.raises(BadImage):
        fetching.resolve("../other/b.jpg", rules)


def test_the_state_of_a_file_changes_when_it_does(root: Path) -> None:
    given = rules_at(root)
    before = fetching.source_state("good.jpg", given)
    assert fetching.source_state(str(root / "good.jpg"), given) == before
    os.utime(root / "good.jpg", ns=(1, 1))
    assert fetching.source_state("good.jpg", given) == f"{len(CONTENT)}:1"
    (root / "good.jpg").write_bytes(CONTENT + b"x")
    assert fetching.source_state("good.jpg", given) not in (before, f"{len(CONTENT)}:1")
    (root / "good.jpg").unlink()
    assert fetching.source_state("good.jpg", given) == fetching.ABSENT


def test_the_state_of_an_object_in_a_store() -> None:
    store = fsspec.filesystem("memory")
    store.pipe("/pictures/a.jpg", CONTENT)
    given = rules_at(Path("/"), allowed_schemes=("memory",))
    before = fetching.source_state("memory://pictures/a.jpg", given)
    assert fetching.source_state("memory://pictures/a.jpg", given) == before
    assert read("memory://pictures/a.jpg", given) == CONTENT
    store.pipe("/pictures/a.jpg", CONTENT[::-1])
    assert fetching.source_state("memory://pictures/a.jpg", given) != before
    store.rm("/pictures/a.jpg")
    assert fetching.source_state("memory://pictures/a.jpg", given) == fetching.ABSENT


@pytest.mark.parametrize(
    ("reference", "state"),
    [
        ("../secret.jpg", fetching.FORBIDDEN),
        ("http://127.0.0.1/x.jpg", fetching.FORBIDDEN),
        ("https://other.example/x.jpg", fetching.FORBIDDEN),
        ("https://a.example/x.jpg", ""),
        ("good.jpg/inside", fetching.UNKNOWN),
    ],
)
def test_the_state_of_what_is_not_read(root: Path, reference: str, state: str) -> None:
    given = rules_at(root, allowed_schemes=("https",), allowed_hosts=("a.example",))
    assert fetching.source_state(reference, given) == state
