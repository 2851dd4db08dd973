"""Learning rate by step: linear warm-up, then a cosine (training)."""

import math

from alignrec.pretrain.config import PretrainConfig


def learning_rate(config: PretrainConfig, *, step: int, num_steps: int) -> float:
    """Return the rate of the optimizer step after ``step`` finished ones.

    Args:
        config: peak rate and shares.
        step: finished steps, 0 .. num_steps - 1.
        num_steps: steps of the whole run.
    """
    warmup = round(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    floor = config.final_rate_fraction
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))
