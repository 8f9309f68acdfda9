"""Interface of samplers: prompts and keyed noise in, sequences out.

The settings of a sampler (`pretrain.config.samplers`) name a function of (settings, objective) that
returns a `Sampler`. The packaged one takes the reverse process of the objective, so that a family
of another package needs no change here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from pretrain.errors import ConfigError

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.module import ObjectiveModule
    from pretrain.noise.key import NoiseKey
    from pretrain.objectives.base import Objective

Drawn = tuple[Tensor, Tensor | int]
"""Tokens int64 [b, length], and network evaluations: int64 [b], or one number for all rows."""
Draw = Callable[["ObjectiveModule", Tensor, "NoiseKey", int], Drawn]
"""Function of (module, prompt int64 [b, p], noise keyed by sample, length) that returns `Drawn`."""


@dataclass(frozen=True)
class Sampler:
    """Method to draw sequences, with the name that is recorded with every sample."""

    name: str
    draw: Draw
    steps: bool = True
    """False where the number of steps is fixed (autoregressive models)."""


def ancestral(settings: AncestralConfig, objective: Objective) -> Sampler:
    """Build the sampler of the objective's reverse process; raises ConfigError without one."""
    if settings.greedy_tail and not objective.revises_tokens:
        raise ConfigError(
            f"sampler.greedy_tail needs a family that revises tokens (uniform, distillation, "
            f"interpolating), but the run is {objective.name}; leave it out"
        )
    return objective.sampler(settings)
