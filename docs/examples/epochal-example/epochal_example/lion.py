"""Lion (arXiv 2302.06675): the sign of an interpolated momentum; one state where AdamW has two."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch

from parallel.engine.optimizer import OptimizerSpec, StateTensor
from pretrain.config.optimizers import OptimizerConfig, optimizers
from pretrain.config.types import Momentum


@optimizers.register
class LionConfig(OptimizerConfig):
    """Settings beside those that every optimizer has."""

    name: Literal["lion"] = "lion"
    implementation: ClassVar[str] = "epochal_example.lion:lion"

    betas: tuple[Momentum, Momentum] = (0.9, 0.99)


def lion(settings: LionConfig) -> OptimizerSpec:
    """Declaration: one float32 tensor for each parameter, and no counter."""
    return OptimizerSpec(
        "lion",
        (StateTensor("momentum"),),
        lambda groups: Lion(groups, settings.betas),
        counter=None,
    )


class Lion(torch.optim.Optimizer):
    """Works element by element, so that ZeRO may hand it slices of flat tensors."""

    def __init__(self, groups: list[dict[str, Any]], betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Move every parameter by lr times a sign; decay is decoupled."""
        for group in self.param_groups:
            first, second = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"]
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                direction = torch.lerp(parameter.grad, momentum, first).sign_()
                parameter.add_(direction, alpha=-group["lr"])
                momentum.lerp_(parameter.grad, 1 - second)
