"""Samplers as everybody sees them: prompts and keyed noise in, sequences out.

A sampler's settings (`pretrain.config.samplers`) name a function of (settings, objective) that
returns a `Sampler`. The packaged one asks the objective for its own reverse process, so that a
family from outside is sampled without a line here.
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
"""Tokens int64 [b, length], and network evaluations: of each row int64 [b], or of all alike."""
Draw = Callable[["ObjectiveModule", Tensor, "NoiseKey", int], Drawn]
"""(module, prompt int64 [b, p], noise keyed by sample, length) -> `Drawn`."""


@dataclass(frozen=True)
class Sampler:
    """One way to draw sequences, with the name that is recorded with every sample."""

    name: str
    draw: Draw
    steps: bool = True
    """False where the number of steps is no choice (autoregressive models)."""


def ancestral(settings: AncestralConfig, objective: Objective) -> Sampler:
    """The objective's own reverse process; raises ConfigError where it has none."""
    if settings.greedy_tail and not objective.revises_tokens:
        raise ConfigError(
            f"a greedy tail is defined for families that revise tokens (uniform, distillation and "
            f"interpolating diffusion); the run is {objective.name}: leave it out"
        )
    return objective.sampler(settings)
