"""Dropout: what it does to numbers, and that its masks are functions of their keys alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from small import FAMILIES, build, clean_batch

from pretrain.model.dropout import DropoutKey, dropout, seeded
from pretrain.model.recompute import Recompute
from pretrain.noise.key import NoiseKey

KEY = DropoutKey(seed=123, residual="0/0", heads="0/0", layer=2)
BOTH = {"dropout": 0.2, "attention_dropout": 0.3}


def kept(key, place="mlp", p=0.5, n=1000):
    return dropout(torch.ones(n), p, key, place) > 0


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_right_share_is_kept_and_expectations_stay(p):
    n = 200_000
    x = torch.rand(n, generator=torch.Generator().manual_seed(0)) + 0.5
    y = dropout(x, p, KEY, "mlp")
    rate = float((y > 0).double().mean())
    assert abs(rate - (1 - p)) <= 4 * math.sqrt(p * (1 - p) / n)
    assert torch.equal(y[y > 0], x[y > 0] * torch.tensor(1.0).div(1 - p))
    spread = float(y.double().std()) / math.sqrt(n)
    assert abs(float(y.double().mean() - x.double().mean())) <= 4 * spread


def test_a_mask_is_a_function_of_its_key_and_of_every_part_of_it():
    same = kept(KEY)
    assert torch.equal(kept(KEY), same)
    others = [
        (replace(KEY, seed=124), "mlp"),
        (replace(KEY, layer=3), "mlp"),
        (replace(KEY, residual="1/0"), "mlp"),
        (replace(KEY, residual="0/1"), "mlp"),
        (KEY, "attention"),
    ]
    for key, place in others:
        agreement = float((kept(key, place) == same).double().mean())
        assert abs(agreement - 0.5) <= 4 * 0.5 / math.sqrt(1000)
    positions = [NoiseKey(17, torch.tensor([g, g + 1])).number("dropout") for g in range(100)]
    assert len({*positions, NoiseKey(18, torch.tensor([0])).number("dropout")}) == 101


def test_the_backward_pass_drops_what_the_forward_pass_dropped():
    x = torch.randn(50, 4, requires_grad=True)
    y = dropout(x, 0.4, KEY, "mlp")
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    assert dropout(x, 0.0, KEY, "mlp") is x
    assert dropout(x, 0.4, None, "mlp") is x


def test_a_seeded_generator_leaves_the_global_one_alone():
    torch.manual_seed(1)
    want = torch.rand(4)
    torch.manual_seed(1)
    draws = []
    for _ in range(2):
        with seeded(torch.device("cpu"), 7):
            draws.append(torch.rand(3))
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(torch.rand(4), want)


def module_with(topology, family, mode="none", loss_chunk=None, **changes):
    module = build(topology, FAMILIES[family], loss_chunk=loss_chunk, **{**BOTH, **changes})
    if mode == "none":
        return module
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    old = module.model
    model = Transformer(old.config, old.space, old.topology, recompute=Recompute(mode))
    initialize(model, seed=3)
    return ObjectiveModule(model, module.objective, loss_chunk=loss_chunk)


def gradients(module, first=0):
    clean = replace(clean_batch(), position=first + torch.arange(3))
    noise = NoiseKey(5, clean.position)
    # The same tokens and noise whatever the position: only the masks may differ.
    batch = module.objective.corrupt(clean_batch(), NoiseKey(5, torch.arange(3)))
    loss = module(replace(batch, dropout_seed=noise.number("dropout")))
    loss.backward()
    return [loss.detach(), *(p.grad for p in module.parameters())]


@pytest.mark.parametrize("family", ["autoregressive", "block"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_recomputed_layers_drop_the_same(topology, family, conditioned):
    shape = {"num_layers": 2, "time_conditioning": conditioned}
    want = gradients(module_with(topology, family, **shape))
    for mode in ("selective", "full"):
        got = gradients(module_with(topology, family, mode, **shape))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), mode


def test_masks_change_with_the_step_and_nothing_else_does(topology):
    state = torch.get_rng_state()
    module = module_with(topology, "autoregressive")
    first, again, later = gradients(module)[0], gradients(module)[0], gradients(module, first=8)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, later)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("which", list(BOTH))
def test_each_of_both_kinds_drops(topology, which):
    without = dict.fromkeys(BOTH, 0.0)
    plain = gradients(module_with(topology, "masked", **without))[0]
    assert not torch.equal(
        gradients(module_with(topology, "masked", **{**without, which: 0.2}))[0], plain
    )


def test_evaluation_and_sampling_drop_nothing(topology):
    clean = clean_batch()
    module = module_with(topology, "masked")
    plain = module_with(topology, "masked", dropout=0.0, attention_dropout=0.0)
    batch = plain.objective.bound_batch(clean, NoiseKey(5, clean.position))
    with torch.no_grad():
        want = plain(batch, exact=True)
        for training in (True, False):
            module.train(training)
            assert torch.equal(module(batch, exact=True), want)
        # Not even with a key that was left on the batch.
        assert torch.equal(module(replace(batch, dropout_seed=3), exact=True), want)


def test_training_without_a_key_is_a_mistake(topology):
    clean = clean_batch()
    module = module_with(topology, "masked")
    with pytest.raises(AssertionError, match="dropout_seed"):
        module(module.objective.corrupt(clean, NoiseKey(5, clean.position)))


def test_dropped_attention_has_the_expectation_of_whole_attention(topology):
    from pretrain.batch import AttentionRule
    from pretrain.model.attention import AttentionPlan
    from pretrain.model.layers import rotary_phases

    attention = module_with(topology, "masked").model.layers[0].attention
    torch.manual_seed(0)
    x = torch.randn(24, 2, 16)
    plan = AttentionPlan(AttentionRule("bidirectional"), "sdpa")
    phases = rotary_phases(torch.arange(24)[None], 8, 10000.0)
    with torch.no_grad():
        want = attention(x, plan, phases)
        draws = torch.stack(
            [attention(x, plan, phases, replace(KEY, seed=seed)) for seed in range(400)]
        )
    error = draws.std(dim=0) / math.sqrt(len(draws))
    z = (draws.mean(dim=0) - want) / error
    assert float(z.abs().max()) < 5
    assert 0.9 < float(z.std()) < 1.1
