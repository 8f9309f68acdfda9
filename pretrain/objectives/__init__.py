"""Objectives: clean tokens to a training batch, head outputs to a loss. One file a family."""

from pretrain.objectives.base import Objective, build_objective

__all__ = ["Objective", "build_objective"]
