"""The optimizer of the configuration: its settings reach torch, its declaration holds."""

from __future__ import annotations

import torch

from parallel.engine import fragments
from parallel.engine.settings import build_optimizer
from pretrain.config.optimizers import optimizers


def test_adamw_is_torchs_with_the_settings_and_keeps_what_it_declares() -> None:
    settings = optimizers.make("adamw", betas=[0.8, 0.99], eps=1e-6)
    spec = settings.spec()
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer(spec, [{"params": [weight], "weight_decay": 0.5}, {"params": []}])
    (group,) = optimizer.param_groups
    assert type(optimizer) is torch.optim.AdamW
    assert (group["betas"], group["eps"], group["fused"]) == ((0.8, 0.99), 1e-6, True)
    assert (group["weight_decay"], group["lr_scale"]) == (0.5, 1.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    fragments.check_state([(weight, "")], optimizer, spec)
    assert spec.names == ("exp_avg", "exp_avg_sq")
    assert spec == settings.model_copy(update={"eps": 1e-5}).spec(), "what a layout depends on"
