"""Parameter groups of the optimizer: matrices decay, norms and biases do not, embeddings by choice.

A module may name parameters with a separate rate (`lr_scales`); those do not decay.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrain.config.run import OptimizerConfig


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups with `params`, `weight_decay` and maybe `lr_scale`; every parameter is in
    exactly one."""
    lr_scales: dict[str, float] = getattr(module, "lr_scales", {})
    scaled: dict[float, list[nn.Parameter]] = {}
    decayed: list[nn.Parameter] = []
    kept: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if name in lr_scales:
            scaled.setdefault(lr_scales[name], []).append(parameter)
            continue
        is_embedding = name.endswith("embedding.weight") and parameter.dim() == 2
        decays = parameter.dim() >= 2 and (config.decay_embeddings or not is_embedding)
        (decayed if decays else kept).append(parameter)
    return [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": kept, "weight_decay": 0.0},
        *({"params": own, "weight_decay": 0.0, "lr_scale": scale} for scale, own in scaled.items()),
    ]
