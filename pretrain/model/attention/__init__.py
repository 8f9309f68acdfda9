"""Core attention behind one interface: a rule says who attends to whom, a kernel computes it.

    plan = plan_attention(rule, wanted, call, b, s)     once a batch, outside the layers
    y = attend(q, k, v, plan, dropout_p)                in every layer

A plan names the kernel (`choice`) and holds what the kernel needs for the whole batch: a dense mask
(`sdpa`), nothing or the bounds of documents (`flash`), a block mask (`flex`). All of it follows
from values on the host, so that planning never waits for a device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.config.kernels import flex_obstacle
from pretrain.errors import ConfigError
from pretrain.model.attention import flex, sdpa
from pretrain.model.attention.choice import (
    Call,
    Kernel,
    Wanted,
    choose_kernel,
    describe_kernels,
)

__all__ = [
    "AttentionPlan",
    "Call",
    "Kernel",
    "attend",
    "choose_kernel",
    "describe_kernels",
    "plan_attention",
]


@dataclass(frozen=True)
class AttentionPlan:
    """Attention rule of a batch, prepared for the kernel that computes it."""

    rule: AttentionRule
    kernel: Kernel
    mask: Any = None
    """Dense bool [b, 1, s, s] for `sdpa`, a BlockMask for `flex`; None where none is needed."""
    neighbours: Tensor | None = None
    """Neighbours that short convolutions read (`pretrain.model.convolution`); None: all."""


def plan_attention(
    rule: AttentionRule, wanted: Wanted, call: Call, batch_size: int, length: int
) -> AttentionPlan:
    """Choose the kernel of `rule` and build its mask; raises ConfigError as `choose_kernel` does.

    Sequences of the batch are `length` positions long, over all context-parallel ranks.
    """
    kernel = choose_kernel(wanted, rule.kind, call)
    if kernel == "sdpa":
        whole = rule.kind in ("causal", "bidirectional")
        return AttentionPlan(rule, kernel, None if whole else rule.mask())
    if kernel == "flex":
        on_gpu = call.device == "cuda" or not torch.is_grad_enabled()
        problem = flex_obstacle(on_gpu, call.head_size, call.dropout)
        if problem is not None:
            raise ConfigError(
                f"model.attention=flex cannot be used here ({problem}); set model.attention to auto"
            )
        mask = flex.block_mask(rule, batch_size, length, call.device)
        return AttentionPlan(rule, kernel, mask)
    return AttentionPlan(rule, kernel)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, dropout_p: float = 0.0) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d] -> [s, b, heads, d].

    `dropout_p` is the probability of dropping an attention weight; what is dropped is drawn from
    torch's generator of the device. A plan made for a call without dropout may refuse it.
    """
    if plan.kernel == "sdpa":
        return sdpa.attend(q, k, v, plan.mask, plan.rule.kind == "causal", dropout_p)
    from pretrain.model.attention.apart import attend_apart  # loads torch's compiler

    return attend_apart(q, k, v, plan.kernel, plan.rule, plan.mask, dropout_p)
