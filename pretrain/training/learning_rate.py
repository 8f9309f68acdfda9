"""Learning rate as a pure function of the progress of the run.

Progress is counted in sample positions, not steps. So it needs no state, and it means the same
after a change of the batch size or of the length of the run.
"""

from __future__ import annotations

import math

from pretrain.config.run import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, *, position: int, total_positions: int, batch_size: int
) -> float:
    """Learning rate of the step that ends at `position` (1 <= position <= total_positions).

    A linear warm-up to `lr` comes first. Then the rate is `constant`, falls as a `cosine` to
    `min_lr` at the last position, or (`wsd`) is constant up to the last `decay` share of the run
    and falls linearly to `min_lr`.
    """
    schedule = config.schedule
    warmup = schedule.warmup * (total_positions if schedule.warmup < 1 else batch_size)
    if position < warmup:
        return config.lr * position / warmup
    if schedule.name == "constant":
        return config.lr
    if schedule.name == "cosine":
        done = (position - warmup) / max(1.0, total_positions - warmup)
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * done))
    start = max(warmup, (1 - schedule.decay) * total_positions)
    if position <= start:
        return config.lr
    left = (total_positions - position) / (total_positions - start)
    return config.min_lr + (config.lr - config.min_lr) * left
