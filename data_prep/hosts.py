"""What a worker process knows of web hosts, from one chunk of pictures to the next (-> web).

A host that is dead, or a name that does not exist, would cost every one of its pictures the whole
time limit. So it is asked now and then, and the pictures in between are given up at once.
"""

import dataclasses
import functools
import threading
import time

from data_prep.addresses import HostAway, Policy, Target
from data_prep.config import HttpConfig
from data_prep.quarantine import Reason

# Pictures in a row that a host may cost all attempts before it is only asked now and then.
MAX_IN_VAIN = 10
PROBE_SECONDS = 10.0


@dataclasses.dataclass
class _State:
    """A host that failed.

    Attributes:
        in_vain: pictures that failed in a row.
        reason: why the last one did.
        asked_at: when one was last let through, on the monotonic clock.
    """

    in_vain: int = 0
    reason: Reason = Reason.IMAGE_UNREACHABLE
    asked_at: float = 0.0


class Hosts:
    """Which hosts answer; safe to use from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failing: dict[tuple[str, str, int], _State] = {}

    def check(self, target: Target) -> None:
        """Let a picture of a host through: always, or of one that fails now and then.

        Raises:
            HostAway: the host failed lately.
        """
        with self._lock:
            state = self._failing.get(target.origin)
            if state is None or state.in_vain < MAX_IN_VAIN:
                return
            now = time.monotonic()
            if now - state.asked_at >= PROBE_SECONDS:
                state.asked_at = now
                return
        detail = f"{target.shown}: not asked, the host has failed {state.in_vain} times in a row"
        raise HostAway(state.reason, detail, transient=True)

    def is_failing(self, target: Target) -> bool:
        """Say whether further attempts for one picture are in vain."""
        with self._lock:
            state = self._failing.get(target.origin)
            return state is not None and state.in_vain >= MAX_IN_VAIN

    def failed(self, target: Target, reason: Reason, *, is_absent: bool = False) -> None:
        """Note a picture in vain; a name that does not exist counts as many."""
        with self._lock:
            state = self._failing.setdefault(target.origin, _State())
            state.in_vain += MAX_IN_VAIN if is_absent else 1
            state.reason = reason
            state.asked_at = time.monotonic()

    def answered(self, target: Target) -> None:
        """Note an answer, a refusal too."""
        with self._lock:
            self._failing.pop(target.origin, None)


@functools.cache
def known_hosts(policy: Policy, settings: HttpConfig) -> Hosts:  # noqa: ARG001 - they are the key
    """Return what this process knows under the same rules."""
    return Hosts()
