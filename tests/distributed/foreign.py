"""Optimizers of somebody else, declared here: neither is known to the package."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from parallel.engine.optimizer import OptimizerSpec, StateTensor
from pretrain.config.optimizers import AdamWConfig

SCALE = 30.0
"""Momentum steps by the gradient itself and takes a larger rate than AdamW."""


class Foreign(torch.optim.Optimizer):
    """Plain loop over the tensors of `param_groups`."""

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(self.change(weight, self.state[weight]), alpha=group["lr"])

    def change(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        raise NotImplementedError


class Momentum(Foreign):
    """Heavy ball: one tensor of state, no counter."""

    def change(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(weight)
        return state["velocity"].mul_(0.9).add_(weight.grad, alpha=SCALE)


class Scaled(Foreign):
    """Sign-like steps with a second moment in bfloat16, a debt in float32, and a Python counter."""

    def change(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        if not state:
            state["step"] = 0
            state["square"] = torch.zeros_like(weight, dtype=torch.bfloat16)
            state["debt"] = torch.zeros_like(weight)
        state["step"] += 1
        state["square"].lerp_(weight.grad.square().bfloat16(), 0.05)
        wanted = weight.grad + state["debt"]
        taken = wanted / (state["square"].float().sqrt() + 1e-3)
        state["debt"].copy_(wanted - taken.clamp(-1, 1)).mul_(0.5 / state["step"])
        return taken.clamp(-1, 1)


class Whole(Foreign):
    """Steps of the length of the whole tensor's gradient: not elementwise, without state."""

    def change(self, weight: Tensor, state: dict[str, Any]) -> Tensor:
        return weight.grad / weight.grad.norm().clamp(min=1e-6)


SPECS = {
    "adamw": AdamWConfig().spec(),
    "momentum": OptimizerSpec("momentum", (StateTensor("velocity"),), Momentum, counter=None),
    "scaled": OptimizerSpec(
        "scaled", (StateTensor("square", "bfloat16"), StateTensor("debt")), Scaled, counter="int"
    ),
    "whole": OptimizerSpec("whole", (), Whole, counter=None, elementwise=False),
}
