"""Text of an item: raw columns in, one clean line as the encoder reads it out."""

import html
import re
import unicodedata
from collections.abc import Iterable

# Controls, lone surrogates, non-characters, and the marks that reorder or hide text on a page.
# Zero-width joiners (U+200C, U+200D) stay: Persian, Hindi and emoji are spelt with them.
_UNWANTED = re.compile(
    "[\x00-\x1f\x7f-\x9f\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff"
    "\ud800-\udfff]+"
)
_SPACES = re.compile(r"\s+")
_LOOK_AHEAD = 8  # an entity such as &eacute; takes up to this many characters for one


def clean(text: str | None, *, max_characters: int) -> str:
    """Return text in NFC on one line, without HTML entities and control characters.

    The work is bounded by ``max_characters``, however long the input is.
    """
    if not text:
        return ""
    decoded = html.unescape(text[: max_characters * _LOOK_AHEAD])
    composed = unicodedata.normalize("NFC", _UNWANTED.sub(" ", decoded))
    return _SPACES.sub(" ", composed).strip()[:max_characters].rstrip()


def join(parts: Iterable[str], *, separator: str) -> str:
    """Join the parts that are not empty."""
    return separator.join(part for part in parts if part)
