"""Optimizers of somebody else, declared here: none is known to the package."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from parallel.engine.optimizer import OptimizerSpec, StateGroup, StateTensor
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


class Divided(Foreign):
    """Heavy ball for the matrices of the layers, Adam for all other parameters."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            rule = self.heavy_ball if group["state_group"] == "matrix" else self.adam
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.sub_(rule(weight.grad, self.state[weight]), alpha=group["lr"])

    def heavy_ball(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        velocity = state.setdefault("velocity", torch.zeros_like(gradient))
        return velocity.mul_(0.9).add_(gradient, alpha=SCALE)

    def adam(self, gradient: Tensor, state: dict[str, Any]) -> Tensor:
        step = state.setdefault("step", torch.zeros(()))
        first = state.setdefault("exp_avg", torch.zeros_like(gradient))
        second = state.setdefault("exp_avg_sq", torch.zeros_like(gradient))
        step += 1
        first.lerp_(gradient, 0.1)
        second.lerp_(gradient.square(), 0.05)
        corrected = (second / (1 - 0.95 ** float(step))).sqrt() + 1e-3
        return first / (1 - 0.9 ** float(step)) / corrected


def layer_matrix(parameter: str, shape: Sequence[int]) -> str:
    """Group `matrix` for the matrices of layers, without their convolutions; else that of Adam."""
    matrix = ".layers." in parameter and len(shape) == 2 and "convolution" not in parameter
    return "matrix" if matrix else ""


SPECS = {
    "adamw": AdamWConfig().spec(),
    "momentum": OptimizerSpec("momentum", (StateTensor("velocity"),), Momentum, counter=None),
    "scaled": OptimizerSpec(
        "scaled", (StateTensor("square", "bfloat16"), StateTensor("debt")), Scaled, counter="int"
    ),
    "divided": OptimizerSpec(
        "divided",
        (StateTensor("exp_avg"), StateTensor("exp_avg_sq")),
        Divided,
        groups=(StateGroup("matrix", (StateTensor("velocity"),), counter=None),),
        group_of=layer_matrix,
    ),
    "whole": OptimizerSpec("whole", (), Whole, counter=None, elementwise=False),
}
