"""Cleaning of texts."""

import time
import unicodedata

import pytest

from data_prep import texts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (None, ""),
        ("", ""),
        (" a\t\nb  c ", "a b c"),
        ("caf&eacute; &amp; bar", "café & bar"),
        ("cafe\u0301", "café"),
        ("a\x00b\x1bc\x7fd", "a b c d"),
        ("left\u202eright\u2066x", "left right x"),
        ("\ufeffmark", "mark"),
        ("lone \ud800 surrogate", "lone surrogate"),
        ("&#0;a&#55296;", "a"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # Persian needs the joiner
        ("👩\u200d🔬", "👩\u200d🔬"),
    ],
)
def test_text_becomes_one_clean_line(raw: str | None, expected: str) -> None:
    assert texts.clean(raw, max_characters=100) == expected


def test_cleaning_twice_changes_nothing() -> None:
    for raw in ("e\u0301" * 50, "  a \x00 b ", "x" * 99 + " y"):
        once = texts.clean(raw, max_characters=40)
        assert len(once) <= 40
        assert unicodedata.is_normalized("NFC", once)
        assert texts.clean(once, max_characters=40) == once


def test_a_huge_title_costs_no_more_than_a_long_one() -> None:
    huge = "&amp;\x00" * 5_000_000
    start = time.process_time()
    assert texts.clean(huge, max_characters=300).startswith("& &")
    assert time.process_time() - start < 0.2


def test_empty_parts_leave_no_separator() -> None:
    assert texts.join(["a", "", "b", ""], separator=" | ") == "a | b"
