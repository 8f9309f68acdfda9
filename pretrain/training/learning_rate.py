"""Learning rate as a pure function of how much of the run is done.

Progress is counted in sample positions, not steps: it needs no state, and a changed batch size or a
longer run keeps its meaning.
"""

from __future__ import annotations

import math

from pretrain.config.run import OptimizerConfig


def learning_rate(
    config: OptimizerConfig, *, position: int, total_positions: int, batch_size: int
) -> float:
    """Rate of the step that ends at `position` (1 <= position <= total_positions).

    Linear warm-up reaches `lr` at its end; then `constant`, `cosine` down to `min_lr` at the last
    position, or `wsd`: constant until the last `decay` share, then linear down to `min_lr`.
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
