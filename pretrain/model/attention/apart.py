"""Kernels that a compiled layer calls without compiling them: flash packages, FlexAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pretrain.batch import AttentionRule
from pretrain.model.attention import flash, flex
from pretrain.model.attention.choice import Kernel


@torch.compiler.disable
def attend_apart(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel: Kernel,
    rule: AttentionRule,
    mask: Any,
    dropout_p: float,
) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d] by `flex` or a flash package."""
    if kernel == "flex":
        assert dropout_p == 0.0, "FlexAttention has no dropout; the choice should have refused it"
        return flex.attend(q, k, v, mask)
    return flash.attend(q, k, v, rule, kernel, dropout_p)
