"""A rank that makes no progress shows where it stands (every long stage -> its log folder).

All ranks stop when one does, because they wait for it. So each counts its beats, and the one with
the fewest is named.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from alignrec.distributed.process_group import Rank

# What a part of a long stage calls when it has got on: Watchdog.beat or Watchdog.alive.
Beat = Callable[[], None]

_GRACE_SECONDS = 2.0  # for the stacks of the peers, which stopped a moment earlier or later


def unwatched() -> None:
    """Be the beat of nobody's watchdog."""


class Watchdog:
    """Writes the stacks of all threads when ``beat`` is not called for some time.

    The stacks of rank 1 go to ``<log_dir>/stacks_0001.txt``, a line about them to stderr. Nothing
    is ended: that is left to the timeout of the process group.
    """

    def __init__(self, rank: Rank, log_dir: Path, *, seconds: float | None, doing: str) -> None:
        """Prepare to watch; nothing happens before the ``with`` block.

        Args:
            rank: this rank.
            log_dir: folder of the stage's logs, best on storage that all ranks share.
            seconds: silence after which stacks are written; None: never.
            doing: what the rank does, e.g. "pretraining".
        """
        self._rank = rank
        self._seconds = seconds
        self._doing = doing
        self._folder = log_dir
        self._beats = 0
        self._lock = threading.Lock()  # batches are made, and beat, in a thread
        self._last = time.monotonic()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._seconds is not None:
            for name in ("stacks_{:04d}.txt", "stacks_{:04d}.json"):  # of an earlier run
                (self._folder / name.format(self._rank.index)).unlink(missing_ok=True)
            self.beat()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Tell that this rank has got on, as often as every other; cheap enough for any place."""
        with self._lock:
            self._beats += 1
        self.alive()

    def alive(self) -> None:
        """Tell that this rank has got on where ranks do so unequally often: it does not count."""
        self._last = time.monotonic()

    def _watch(self) -> None:
        assert self._seconds is not None
        shown = 0.0  # when the standstill of the last dump began: one dump each
        while not self._over.wait(min(1.0, self._seconds / 4)):
            last = self._last
            silent = time.monotonic() - last
            if silent >= self._seconds and shown != last:
                shown = last
                self._report(silent)

    def _report(self, silent: float) -> None:
        path = self._folder / f"stacks_{self._rank.index:04d}.txt"
        line = (
            f"rank {self._rank.index} of {self._rank.world_size} (host {socket.gethostname()}, "
            f"process {os.getpid()}) has made no progress for {silent:.0f} s while {self._doing}"
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        with path.open("w", encoding="utf-8") as file:
            file.write(f"{line}\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
        # beats last, by rename: who reads them finds the stacks complete
        spare = path.with_suffix(".writing")
        spare.write_text(json.dumps(self._beats), encoding="utf-8")
        spare.replace(path.with_suffix(".json"))
        self._over.wait(_GRACE_SECONDS)
        print(f"{line}; {self._culprit()}; stacks of its threads: {path}", file=sys.stderr)

    def _culprit(self) -> str:
        """Say which of the ranks that stand still is behind the others."""
        beats = {}
        for index in range(self._rank.world_size):
            path = self._folder / f"stacks_{index:04d}.json"
            if path.exists():
                beats[index] = int(json.loads(path.read_text(encoding="utf-8")))
        behind = [index for index, count in beats.items() if count == min(beats.values())]
        if len(beats) < self._rank.world_size:
            missing = sorted(set(range(self._rank.world_size)) - beats.keys())
            return f"nothing is known of ranks {missing}, which ended, run on or log elsewhere"
        if len(behind) == len(beats):
            return "no rank is behind the others"
        return f"behind the others: rank {', '.join(map(str, behind))}"
