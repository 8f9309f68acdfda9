"""CompleteP: the standard model at the base size, and steps of the same size at every other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from small import BATCH, LENGTH, SPACE, build, clean_batch

from parallel.engine.settings import build_optimizer
from pretrain.batch import AttentionRule
from pretrain.config.optimizers import AdamWConfig
from pretrain.config.run import Config, ModelConfig
from pretrain.model.parametrization import Multipliers, multipliers, ratios
from pretrain.noise.key import NoiseKey
from pretrain.planning.plan import costs
from pretrain.training.parameter_groups import parameter_groups

EVERYTHING = {
    "num_layers": 2,
    "time_conditioning": True,
    "qk_norm": True,
    "short_convolution": 3,
    "tie_embeddings": False,
}


def complete_p(width: int, depth: int) -> dict[str, Any]:
    """Settings of CompleteP with this base."""
    return {"parametrization": "complete_p", "base_hidden_size": width, "base_num_layers": depth}


def optimizer_of(module: Any, **settings: Any) -> torch.optim.Optimizer:
    config = AdamWConfig(lr=2e-3, **settings)
    optimizer = build_optimizer(config.spec(), parameter_groups(module, config))
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    return optimizer


def steps(module: Any, number: int, **settings: Any) -> list[float]:
    """Losses of some steps on one batch, with new noise at each."""
    optimizer, losses = optimizer_of(module, **settings), []
    clean = clean_batch()
    for step in range(number):
        batch = module.objective.corrupt(clean, NoiseKey(0, clean.position + step * BATCH))
        loss = module(batch) / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("objective", ["autoregressive", "uniform"])
def test_at_the_base_size_everything_is_bitwise_standard(topology, objective: str) -> None:
    """Weights, losses, updates and the groups of the optimizer."""
    shape = {**EVERYTHING, "hidden_size": 16}
    plain, base = (
        build(topology, {"name": objective}, **shape, **changes)
        for changes in ({}, complete_p(16, 2))
    )
    assert steps(plain, 3) == steps(base, 3)
    for (name, one), (_, other) in zip(
        plain.named_parameters(), base.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name
    groups = [
        [{**group, "params": len(group["params"])} for group in parameter_groups(m, AdamWConfig())]
        for m in (plain, base)
    ]
    assert groups[0] == groups[1]
    assert len(groups[0]) == 2


def test_rules_are_those_of_the_paper(topology) -> None:
    """Table 1 of arXiv 2505.01618 with alpha = 1, for width 4 and depth 3 times the base."""
    model = ModelConfig(num_layers=6, hidden_size=64, num_attention_heads=2, **complete_p(16, 2))
    assert (ratios(model).width, ratios(model).depth) == (4, 3)
    hidden = Multipliers(lr=1 / 4, weight_decay=4, eps=1 / 12, init=1 / 2)
    for name in ("attention.qkv", "attention.out", "mlp.up", "mlp.down"):
        assert multipliers(f"model.layers.5.{name}.weight", model) == hidden
    for name in ("attention_norm", "mlp_norm", "attention.q_norm", "mlp_convolution"):
        assert multipliers(f"model.layers.0.{name}.weight", model) == Multipliers(eps=1 / 12)
    assert multipliers("model.layers.0.modulation.linear.bias", model) == Multipliers(eps=1 / 12)
    for name in ("embedding", "head.norm", "head.projection"):
        assert multipliers(f"model.{name}.weight", model) == Multipliers(eps=1 / 4)
    assert multipliers("model.noise_embedding.first.weight", model) == Multipliers()


def test_initial_weights_and_the_optimizer_follow_the_rules(topology) -> None:
    shape = {"hidden_size": 64, "num_layers": 4, "ffn_hidden_size": 128, "init_std": 0.3}
    module = build(topology, {"name": "masked"}, **shape, **complete_p(16, 2))
    deviation = {n: float(p.detach().std()) for n, p in module.named_parameters()}
    assert deviation["model.embedding.weight"] == pytest.approx(0.3, rel=0.05)
    assert deviation["model.layers.3.mlp.up.weight"] == pytest.approx(0.3 / 2, rel=0.05)
    # Divided by sqrt(2 x base depth) as at the base, not by that of this depth.
    assert deviation["model.layers.3.mlp.down.weight"] == pytest.approx(0.3 / 2 / 2, rel=0.05)
    optimizer = optimizer_of(module, weight_decay=0.2, eps=1e-6)
    of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    named = dict(module.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    matrix = of[id(named["model.layers.0.mlp.up.weight"])]
    assert (matrix["lr"], matrix["weight_decay"]) == (2e-3 / 4, 0.2 * 4)
    assert matrix["eps"] == pytest.approx(1e-6 / 8)
    embedding = of[id(named["model.embedding.weight"])]
    assert (embedding["lr"], embedding["weight_decay"], embedding["eps"]) == (2e-3, 0.2, 2.5e-7)
    norm = of[id(named["model.layers.0.mlp_norm.weight"])]
    assert (norm["lr"], norm["weight_decay"]) == (2e-3, 0.0)


def test_logits_and_branches_are_multiplied(topology) -> None:
    """Against the standard model with the same weights: one layer, whose branches are known."""
    shape = {"num_layers": 1, "hidden_size": 32}
    plain = build(topology, {"name": "masked"}, **shape)
    wide = build(topology, {"name": "masked"}, **shape, **complete_p(8, 1))
    wide.load_state_dict(plain.state_dict())
    ids, positions = torch.randint(5, 100, (2, 9)), torch.arange(9)[None]
    rule = AttentionRule("bidirectional")
    want = plain.model(ids, positions, rule)
    assert torch.equal(wide.model(ids, positions, rule), want / 4)

    class Halved(torch.nn.Module):
        def __init__(self, part: torch.nn.Module) -> None:
            super().__init__()
            self.part = part

        def forward(self, *given: Any) -> torch.Tensor:
            half: torch.Tensor = self.part(*given) / 2
            return half

    deep = build(topology, {"name": "masked"}, **{**shape, "num_layers": 2}, **complete_p(32, 1))
    halved = build(topology, {"name": "masked"}, **{**shape, "num_layers": 2})
    halved.load_state_dict(deep.state_dict())
    for layer in halved.model.layers:
        layer.attention, layer.mlp = Halved(layer.attention), Halved(layer.mlp)
    assert torch.allclose(
        deep.model(ids, positions, rule), halved.model(ids, positions, rule), atol=1e-6
    )


@pytest.mark.parametrize("objective", ["autoregressive", "uniform", "gaussian"])
def test_the_planner_has_the_same_groups(topology, objective: str) -> None:
    """Padding of ZeRO is counted for each group."""
    from pretrain.build import build_model
    from pretrain.objectives import build_objective

    conditioned = {} if objective == "gaussian" else EVERYTHING
    shape = {"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    config = Config.model_validate(
        {
            "data": {"train": "a", "validation": "b", "tokenizer": "c", "seq_length": LENGTH},
            "model": {**conditioned, **shape, **complete_p(16, 2)},
            "objective": {"name": objective, "time_window": 2},
        }
    )
    planned = costs(config, SPACE.vocab_size)
    weights = [w for p in (planned.first, planned.layer, planned.last) for w in p.weights]
    groups: dict[int, set[str]] = {}
    for weight in weights:
        groups.setdefault(weight.group, set()).add(weight.name)
    module = build_model(config, topology, build_objective(config.objective, SPACE))
    names = {id(p): name for name, p in module.named_parameters()}
    built = [
        {names[id(p)] for p in group["params"]}
        for group in parameter_groups(module, config.optimizer)
    ]
    assert sorted(map(sorted, groups.values())) == sorted(map(sorted, built))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"parametrization": "complete_p"}, "needs base_hidden_size and base_num_layers"),
        ({"parametrization": "complete_p", "base_num_layers": 2}, "needs base_hidden_size"),
        ({"base_hidden_size": 64}, "have no effect with parametrization standard"),
    ],
)
def test_a_base_without_its_rule_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(**given)


def moved(topology, width: int, depth: int, rule: dict[str, Any], objective: str) -> float:
    """Root mean square by which five steps change the hidden states in front of the head."""
    module = build(
        topology, {"name": objective}, num_layers=depth, hidden_size=width,
        num_attention_heads=width // 16, ffn_hidden_size=2 * width, init_std=0.1, **rule,
    )  # fmt: skip
    ids = torch.randint(5, 100, (4, LENGTH), generator=torch.Generator().manual_seed(2))
    seen: list[torch.Tensor] = []
    layer = module.model.layers[depth - 1]
    layer.register_forward_hook(lambda _, __, out: seen.append(out.detach().clone()))
    attention = AttentionRule("causal" if objective == "autoregressive" else "bidirectional")

    def look() -> torch.Tensor:
        with torch.no_grad():
            module.model(ids, torch.arange(LENGTH)[None], attention)
        return seen[-1]

    before = look()
    steps(module, 5, weight_decay=0.0)
    return float((look() - before).square().mean().sqrt())


@pytest.mark.parametrize("objective", ["autoregressive", "masked"])
def test_steps_move_hidden_states_alike_at_every_size(topology, objective: str) -> None:
    """Coordinate check. Under the standard rule the change grows with width and depth."""
    base, sizes = complete_p(32, 2), [(32, 2), (128, 2), (256, 2), (32, 8)]
    ours = [moved(topology, *size, base, objective) for size in sizes]
    standard = [moved(topology, *size, {}, objective) for size in sizes]
    print([f"{value:.4f}" for value in ours], [f"{value:.4f}" for value in standard])
    assert ours[0] == standard[0]
    assert max(ours) < 1.8 * min(ours)
    assert standard[2] > 3 * standard[1] > 15 * standard[0]
    assert standard[3] > 1.7 * standard[0]
