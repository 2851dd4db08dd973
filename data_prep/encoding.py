"""Bytes of any text file in, valid UTF-8 out (files -> readers of delimited text).

pyarrow gives up a whole CSV file where a row that it refuses is no valid UTF-8.
"""

import codecs
import io
from typing import IO

from alignrec.errors import UserError

_LATIN_1 = "data_prep.latin_1"
_UTF_16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def _as_latin_1(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return error.object[error.start : error.end].decode("latin-1"), error.end


codecs.register_error(_LATIN_1, _as_latin_1)


class Utf8Stream(io.RawIOBase):
    """A stream of bytes of which what is no UTF-8 is replaced.

    Args:
        raw: the bytes as they are.
        name: of the file, for messages.
        swap: (text, replacement); the text is one character, once or repeated.
        latin_1: read invalid bytes as Latin-1; otherwise each becomes U+FFFD.
    """

    def __init__(
        self,
        raw: IO[bytes],
        name: str,
        *,
        swap: tuple[str, str] | None = None,
        latin_1: bool = False,
    ) -> None:
        super().__init__()
        self._raw = raw
        self._name = name
        self._swap = swap
        self._decoder = codecs.getincrementaldecoder("utf-8")(_LATIN_1 if latin_1 else "replace")
        self._ready = b""
        self._held = ""  # the end of a block that may be the beginning of a text to swap
        self._started = False
        self._ended = False

    def readable(self) -> bool:
        """Say that this can be read."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return at most ``size`` bytes; none at the end.

        Raises:
            UserError: the file is UTF-16.
        """
        while not self._ready and not self._ended:
            data = self._raw.read(size)
            self._ended = not data
            self._ready = self._translated(data)
        if size < 0 or size >= len(self._ready):
            result, self._ready = self._ready, b""
        else:
            result, self._ready = self._ready[:size], self._ready[size:]
        return result

    def _translated(self, data: bytes) -> bytes:
        if not self._started and data.startswith(_UTF_16_MARKS):
            raise UserError(
                f"{self._name} is UTF-16, but tables must be UTF-8. Convert it: "
                f"iconv -f UTF-16 -t UTF-8 IN > OUT"
            )
        self._started = True
        if self._swap is None and data.isascii() and not self._decoder.getstate()[0]:
            return data
        text = self._held + self._decoder.decode(data, final=self._ended)
        if self._swap is None:
            return text.encode()
        kept = text if self._ended else text.rstrip(self._swap[0][0])
        self._held = text[len(kept) :]
        return kept.replace(*self._swap).encode()
