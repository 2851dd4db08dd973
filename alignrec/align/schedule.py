"""Learning rate by epoch, and when training stops (validation metrics -> trainer)."""

import dataclasses
import math

from alignrec.align.config import AlignConfig

_DECAY_EPOCHS = 50


def learning_rate(config: AlignConfig, epoch: int) -> float:
    """Return learning_rate x decay^(epoch / 50)."""
    return config.learning_rate * math.pow(config.learning_rate_decay, epoch / _DECAY_EPOCHS)


@dataclasses.dataclass
class Selection:
    """Which evaluation was the best so far, and for how long.

    Attributes:
        metrics: of the best evaluation, by name.
        epoch: of the best evaluation; -1 for that of the parameters training went on from, and
            before the first.
        stale: evaluations since then.
    """

    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    epoch: int = -1
    stale: int = 0

    def offer(self, metrics: dict[str, float], *, by: str, epoch: int) -> bool:
        """Take an evaluation into account and tell whether it is the best so far."""
        if self.metrics and metrics[by] <= self.metrics[by]:
            self.stale += 1
            return False
        self.metrics, self.epoch, self.stale = dict(metrics), epoch, 0
        return True
