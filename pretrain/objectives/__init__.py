"""Objectives: clean tokens to a training batch, head outputs to a loss. One file a family."""

from pretrain.objectives import (  # noqa: F401  (importing registers them)
    autoregressive,
    block,
    distillation,
    esoteric,
    gaussian,
    interpolating,
    masked,
    uniform,
)
from pretrain.objectives.base import Objective, build_objective, objective_names

__all__ = ["Objective", "build_objective", "objective_names"]
