"""Learning rate as a pure function of the progress of the run.

Progress is counted in sample positions, not steps. The length of the warm-up is fixed in positions
when the run first starts and saved with every checkpoint, so that the rate never falls back into it
when the batch size or the length of the run changes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from data_pipeline.stream.budget import total_positions
from pretrain.config.optimizers import ScheduleConfig
from pretrain.config.run import Config, OptimizerConfig
from pretrain.errors import ConfigError


def warmup_positions(schedule: ScheduleConfig, *, total_positions: int, batch_size: int) -> float:
    """Length of the warm-up in sample positions: a share of the run, or a number of steps."""
    return schedule.warmup * (total_positions if schedule.warmup < 1 else batch_size)


def check_warmup(schedule: ScheduleConfig, *, total_positions: int, batch_size: int) -> None:
    """Raise ConfigError where the warm-up has more steps than the run."""
    steps = -(-total_positions // batch_size)
    if schedule.warmup > max(1, steps):
        raise ConfigError(
            f"optimizer.schedule.warmup {schedule.warmup:g} steps is longer than the run of "
            f"{steps:,} steps ({total_positions:,} sequences in batches of {batch_size:,}); lower "
            "it, give a share below 1, or raise data.epochs"
        )


def resumed_warmup(saved: Mapping[str, Any], config: Config, sequences_per_epoch: int) -> float:
    """Length of the warm-up of a run in sample positions, from the state of its checkpoint.

    It is that of the first start, unless `config` has another `warmup` than the checkpoint: then it
    is computed anew, from the present batch size and length. A checkpoint of an earlier version has
    no length; there it follows from the configuration that it was saved with. Raises ConfigError
    where the run was shortened so much that it would end in its warm-up.
    """
    before, schedule = saved["config"], config.optimizer.schedule
    epochs, present = before["data.epochs"], config.data.epochs
    total = total_positions(sequences_per_epoch, present)
    if before["optimizer.schedule.warmup"] != schedule.warmup:
        batch_size = config.train.global_batch_size
        return warmup_positions(schedule, total_positions=total, batch_size=batch_size)
    if "schedule" in saved:
        warmup = float(saved["schedule"]["warmup_positions"])
    else:
        warmup = warmup_positions(
            schedule,
            total_positions=total_positions(sequences_per_epoch, epochs),
            batch_size=before["train.global_batch_size"],
        )
    if epochs != present and warmup > total:
        raise ConfigError(
            f"the warm-up of this run is {warmup:,.0f} sequences long, but with data.epochs "
            f"{present:g} the run ends after {total:,}; raise data.epochs, or set another "
            "optimizer.schedule.warmup"
        )
    return warmup


def decay_start(schedule: ScheduleConfig, *, total_positions: int, warmup: float) -> float:
    """Position after which `wsd` lowers the rate: every step that ends there or before has `lr`."""
    return max(warmup, (1 - schedule.decay) * total_positions)


def learning_rate(
    config: OptimizerConfig, *, position: int, total_positions: int, warmup: float
) -> float:
    """Learning rate of the step that ends at `position` (1 <= position <= total_positions).

    A linear warm-up to `lr` over `warmup` positions comes first. Then the rate is `constant`, falls
    as a `cosine` to `min_lr` at the last position, or (`wsd`) is constant up to the last `decay`
    share of the run and falls linearly to `min_lr`.
    """
    schedule = config.schedule
    if position < warmup:
        return config.lr * position / warmup
    if schedule.name == "constant":
        return config.lr
    if schedule.name == "cosine":
        done = (position - warmup) / max(1.0, total_positions - warmup)
        return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * done))
    start = decay_start(schedule, total_positions=total_positions, warmup=warmup)
    if position <= start:
        return config.lr
    left = (total_positions - position) / (total_positions - start)
    return config.min_lr + (config.lr - config.min_lr) * left
