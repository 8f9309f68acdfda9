"""Recomputation: the same gradients bit for bit, fewer bytes kept between the two passes."""

from __future__ import annotations

import pytest
import torch

from pretrain.batch import AttentionRule
from pretrain.config.run import ModelConfig
from pretrain.model.recompute import Keep, Recompute
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(50, 128, 0, 4, 5, (0, 1, 2, 3, 4))
LENGTH, BATCH = 64, 3
SHAPES = {
    "plain": {},
    "grouped": {"num_query_groups": 2, "qk_norm": True, "tie_embeddings": False},
    "conditioned": {"time_conditioning": True, "activation": "gelu"},
    "squared_relu": {"activation": "squared_relu"},
    "convolved": {"short_convolution": 5, "time_conditioning": True},
}


def build(topology, mode="none", layers=None, **changes):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    shape = {"num_layers": 3, "hidden_size": 64, "num_attention_heads": 4, "init_std": 0.2}
    model = Transformer(
        ModelConfig(**{**shape, **changes}),
        SPACE,
        topology,
        recompute=Recompute(mode, layers),
    )
    initialize(model, seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modulation" in name:  # a fresh one is the identity, which would test nothing
                parameter.add_(torch.sin(torch.arange(parameter.numel())).view_as(parameter) / 5)
    return model


def hidden(model, kind="causal"):
    ids = torch.randint(5, 50, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    level = torch.linspace(0.1, 3.0, BATCH) if model.config.time_conditioning else None
    rule = AttentionRule(kind)
    if kind == "columns":
        group = torch.arange(LENGTH).expand(BATCH, LENGTH) // 8
        rule = AttentionRule.from_columns(torch.zeros_like(group), group, group, group)
    return model(ids, torch.arange(LENGTH)[None], rule, level)


def gradients(model, kind):
    out = hidden(model, kind)
    (out * torch.sin(torch.arange(out.numel())).view_as(out)).sum().backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def bytes_kept(model, kind="causal"):
    """Memory that a forward pass takes and does not give back, less that of its result."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        out = hidden(model, kind)
    events = profile.profiler.kineto_results.events()
    return sum(event.nbytes() for event in events) - out.nbytes


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["causal", "columns"])
def test_gradients_are_bitwise_those_of_a_model_that_keeps_everything(topology, shape, kind):
    want = gradients(build(topology, **SHAPES[shape]), kind)
    assert all(g.abs().max() > 0 for g in want.values())
    for mode, layers in (("selective", None), ("full", None), ("selective", 1), ("full", 2)):
        got = gradients(build(topology, mode, layers, **SHAPES[shape]), kind)
        assert got.keys() == want.keys()
        for name, gradient in want.items():
            assert torch.equal(got[name], gradient), (mode, layers, name)


@pytest.mark.parametrize("shape", SHAPES)
def test_as_many_bytes_are_kept_as_promised(topology, shape):
    """In numbers of 4 bytes a token and layer; what is left over are norms' roots and the like."""
    model = build(topology, **SHAPES[shape])
    config, tokens = model.config, LENGTH * BATCH
    h, f = config.hidden_size, config.ffn_size
    gates = 2 if config.activation == "swiglu" else 1
    qkv = (config.num_attention_heads + 2 * config.query_groups) * config.head_size

    def per_layer(mode):
        """The difference that two more layers make, so that neither end of the model counts."""
        sizes = [
            bytes_kept(build(topology, mode, **{**SHAPES[shape], "num_layers": n})) for n in (1, 3)
        ]
        return (sizes[1] - sizes[0]) / 2 / 4 / tokens

    modulated = config.time_conditioning
    everything, selective, full = (per_layer(m) for m in ("none", "selective", "full"))
    assert h <= full <= 1.1 * h
    # Input, qkv, attention, sum, inside of the MLP; conditioned also both branches before the gate.
    assert selective <= 1.1 * ((3 + 2 * modulated) * h + qkv + gates * f)
    assert selective >= 3 * h + qkv + gates * f
    # On top of it both norms, rotated queries and keys, the activation, and what is convolved.
    convolved = 2 * h if config.short_convolution else 0
    again = 2 * h + f + qkv - config.query_groups * config.head_size + convolved
    assert everything >= selective + again


def test_some_layers_only(topology):
    sizes = [bytes_kept(build(topology, "full", n)) for n in (1, 2, 3)]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[0] - sizes[1] == pytest.approx(sizes[1] - sizes[2], rel=0.05)


def test_a_replaced_tensor_is_made_once_for_all_its_uses_and_again_for_a_second_pass():
    keep, calls = Keep(active=True), []

    def make(x):
        calls.append(1)
        return x.exp()

    x = torch.linspace(0, 1, 5, requires_grad=True)
    made = make(x.detach()).requires_grad_()
    with keep.instead_of(made, make, x):
        y = made[1:] * made[:-1] * x[1:]
    assert len(calls) == 1
    for number in (2, 3):
        y.sum().backward(retain_graph=True)
        assert len(calls) == number
    want = torch.zeros(5)
    e = x.detach().exp()
    want[1:] += e[:-1] * x.detach()[1:]
    want[:-1] += e[1:] * x.detach()[1:]
    torch.testing.assert_close(made.grad, 2 * want)


def test_nothing_is_replaced_outside_or_without_gradients():
    keep, x = Keep(active=True), torch.ones(3, requires_grad=True)
    made = x.detach().exp().requires_grad_()

    def never(x):
        raise AssertionError("made again")

    with torch.no_grad(), keep.instead_of(made, never, x):
        made * made
    with keep.instead_of(made, never, x):
        pass
    (made * made).sum().backward()
    with Keep(active=False).instead_of(made, never, x):
        (made * made).sum().backward()
