"""Pictures' bytes: from below the root or allowed addresses only, in bounded time and size."""

import os
from pathlib import Path
from typing import Any

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


def test_an_allowed_scheme_is_read(root: Path) -> None:
    url = (root / "good.jpg").as_uri()
    assert read(url, rules_at(root, allowed_schemes=("file",))) == CONTENT


def test_a_root_may_be_a_url() -> None:
    rules = rules_at("s3://bucket/pictures")
    assert fetching.resolve("a/b.jpg", rules) == "s3://bucket/pictures/a/b.jpg"
    with pytest.raises(BadImage):
        fetching.resolve("../other/b.jpg", rules)
