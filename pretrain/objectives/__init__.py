"""Objectives: clean tokens to a training batch, head outputs to a loss. One file a family."""

from pretrain.objectives import autoregressive, masked  # noqa: F401  (importing registers them)
from pretrain.objectives.base import Objective, build_objective, objective_names

__all__ = ["Objective", "build_objective", "objective_names"]
