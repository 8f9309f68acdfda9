"""AdamW as the engine knows it: the state it keeps, and torch's fused form of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.engine.optimizer import OptimizerSpec, StateTensor

if TYPE_CHECKING:
    import torch

    from pretrain.config.optimizers import AdamWConfig


def adamw_spec(config: AdamWConfig) -> OptimizerSpec:
    """Declaration of AdamW with these settings."""

    def build(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        import torch

        # A model may ask for another eps of some parameters (`pretrain.model.parametrization`).
        groups = [{**group, "eps": config.eps * group.get("eps_scale", 1.0)} for group in groups]
        # DeepSpeed's own AdamW would compile an extension first (minutes on a CPU).
        return torch.optim.AdamW(groups, lr=0.0, betas=config.betas, eps=config.eps, fused=True)

    return OptimizerSpec("adamw", (StateTensor("exp_avg"), StateTensor("exp_avg_sq")), build)
