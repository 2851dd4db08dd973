"""Lines of a growing log shown on the terminal while a stage runs (rank's log -> driver)."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Self

_POLL_SECONDS = 0.25


class LogFollower:
    """Shows the complete lines that begin with ``prefix``, from where the file ends now."""

    def __init__(self, path: Path, *, prefix: str, show: Callable[[str], None]) -> None:
        self.path = path
        self._prefix = prefix
        self._show = show
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._read()

    def _follow(self) -> None:
        while not self._end.wait(_POLL_SECONDS):
            self._read()

    def _read(self) -> None:
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            fresh = file.read()
        self._offset += len(fresh)
        *lines, self._rest = (self._rest + fresh).split(b"\n")
        for line in lines:
            text = line.decode(errors="replace")
            if text.startswith(self._prefix):
                self._show(text)
