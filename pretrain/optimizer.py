"""Which parameters decay: matrices do, norm weights and biases do not, embeddings by choice."""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrain.config import OptimizerConfig


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """AdamW groups with `params` and `weight_decay`; every parameter is in exactly one."""
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        is_embedding = name.endswith("embedding.weight") and parameter.dim() == 2
        decays = parameter.dim() >= 2 and (config.decay_embeddings or not is_embedding)
        (decayed if decays else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
    ]
