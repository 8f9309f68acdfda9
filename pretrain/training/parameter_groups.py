"""Parameter groups of the optimizer: matrices decay, norms and biases do not, embeddings by choice.

A module may name parameters with a separate rate (`lr_scales`), which do not decay, and multipliers
of the settings of each parameter (`multipliers`), which follow from the size of the model.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from pretrain.config.run import OptimizerConfig
from pretrain.model.parametrization import NONE, Multipliers


def parameter_groups(module: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Groups with `params`, `weight_decay` and maybe `lr_scale` and `eps_scale`; every parameter is
    in exactly one. Parameters that decay come first."""
    lr_scales: dict[str, float] = getattr(module, "lr_scales", {})
    factors = getattr(module, "multipliers", lambda name: NONE)
    # By (decay, separate rate, multipliers); without multipliers there are always two groups.
    found: dict[tuple[bool, float, Multipliers], list[nn.Parameter]] = {
        (True, 1.0, NONE): [],
        (False, 1.0, NONE): [],
    }
    for name, parameter in module.named_parameters():
        if name in lr_scales:
            found.setdefault((False, lr_scales[name], NONE), []).append(parameter)
            continue
        is_embedding = name.endswith("embedding.weight") and parameter.dim() == 2
        decays = parameter.dim() >= 2 and (config.decay_embeddings or not is_embedding)
        found.setdefault((decays, 1.0, factors(name)), []).append(parameter)
    scaled = any(parts[2] != NONE for parts in found)
    return [
        {
            "params": parameters,
            "weight_decay": config.weight_decay * parts.weight_decay if decays else 0.0,
            "lr_scale": scale * parts.lr,
            "eps_scale": parts.eps,
        }
        for (decays, scale, parts), parameters in found.items()
        if parameters or not scaled
    ]
