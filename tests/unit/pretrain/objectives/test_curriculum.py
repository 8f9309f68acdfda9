"""Duo's curriculum: soft inputs early, the plain family later, a function of position alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import tables
import torch

from pretrain.batch import AttentionRule
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace


def soft(k, sequences=10**9, temperature=1e-3, **fields):
    return tables.family(
        "uniform", k, curriculum_sequences=sequences,
        curriculum_temperature=(temperature, temperature), **fields,
    )  # fmt: skip


def corrupt(family, x, first=0):
    clean = tables.clean_batch(x)
    clean = replace(clean, position=clean.position + first)
    return clean, family.corrupt(clean, NoiseKey(1, clean.position))


def test_softened_batches_estimate_the_bound_over_their_interval_of_levels():
    """One token with its prior as prediction: the mean over real draws is the integral of the exact
    terms over alpha in the interval, which does not depend on how time runs through it."""
    k, n, low, high = 4, 12_000, 0.05, 0.95
    prior = np.array([0.4, 0.3, 0.2, 0.1])
    family = soft(k, curriculum_interval=(low, high), window=64)
    _, batch = corrupt(family, np.full((n, 1), 2))
    chunk = tables.Chunk(np.tile(prior, (n, 1)))
    each = family.token_bound(chunk, batch.targets, batch.extra) * batch.weight.double()
    plain = tables.family("uniform", k)
    nodes, weights = np.polynomial.legendre.leggauss(60)
    expected = 0.0
    for node, weight in zip(nodes, weights, strict=True):
        t = 1 - (low + high + (high - low) * node) / 2  # alpha = 1 - t
        q = tables.kernel(plain.process, t)[2, :k]
        x, z = np.full((k, 1), 2), np.arange(k)[:, None]
        terms = tables.terms(plain, plain.process, t, x, z, np.broadcast_to(prior, (k, 1, k)))
        expected += weight * (high - low) / 2 * float(q @ terms[:, 0])
    error = float(each.std()) / math.sqrt(n)
    assert error < 0.05 * expected
    assert abs(float(each.mean()) - expected) < 4 * error


def test_the_argmax_is_scored_and_the_network_is_noise_conditioned():
    family = soft(6, temperature=0.05)
    _, batch = corrupt(family, np.random.default_rng(0).integers(6, size=(64, 8)))
    assert batch.ids.shape == batch.mix.shape == (64, 8, 2)
    assert torch.equal(batch.ids[..., 0].flatten(), batch.extra["noisy"])
    alpha = batch.extra["alpha"].view(64, 8)[:, 0]
    torch.testing.assert_close(batch.noise_level, -alpha.log().float())
    assert ((alpha > 0.05) & (alpha < 0.95)).all()
    assert float(batch.mix.sum(dim=-1).min()) < 0.9  # not renormalised over the kept


def test_it_ends_inside_a_batch_and_what_follows_is_the_plain_family():
    x = np.random.default_rng(0).integers(6, size=(32, 8))
    x_clean, batch = corrupt(soft(6, sequences=110, temperature=0.1), x, first=100)
    plain = tables.family("uniform", 6).corrupt(x_clean, NoiseKey(1, x_clean.position))
    over = x_clean.position >= 110
    assert torch.equal(batch.ids[over][..., 0], plain.ids[over])
    assert torch.equal(batch.mix[over], torch.tensor([1.0, 0.0]).expand_as(batch.mix[over]))
    assert torch.equal(batch.noise_level[over], plain.noise_level[over])
    assert torch.equal(batch.weight.view(32, 8)[over], plain.weight.view(32, 8)[over])
    assert (batch.mix[~over][..., 0] < 1).any()
    _, after = corrupt(soft(6, sequences=100), x, first=100)
    assert after.mix is None and torch.equal(after.ids, plain.ids)


def test_temperature_falls_log_linearly_over_positions():
    family = tables.family(
        "uniform", 6, curriculum_sequences=100, curriculum_temperature=(0.1, 0.001)
    )
    tau = family.curriculum.tau(torch.tensor([0, 50, 100, 10**6]))
    torch.testing.assert_close(tau, torch.tensor([0.1, 0.01, 0.001, 0.001], dtype=torch.float64))


def test_invalid_positions_stay_pad_and_bounds_are_never_softened():
    family = soft(6, temperature=0.1)
    clean = tables.clean_batch(np.ones((4, 6), dtype=int))
    valid = torch.ones(4, 6, dtype=torch.bool)
    valid[:, 4:] = False
    clean = replace(clean, tokens=torch.where(valid, clean.tokens, 0), valid=valid, all_valid=False)
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    assert (batch.ids[~valid] == 0).all() and (batch.mix[~valid][:, 0] == 1).all()
    assert (batch.weight.view(4, 6)[~valid] == 0).all()
    assert family.bound_batch(clean, NoiseKey(1, clean.position)).mix is None


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"curriculum_sequences": 5, "loss": "simple"}, "loss=elbo"),
        ({"curriculum_temperature": (0.1, 0.1)}, "curriculum_sequences above 0"),
        ({"curriculum_sequences": 5, "curriculum_top_k": 6}, "must be below the 6 ids"),
    ],
)
def test_settings_that_do_not_fit_are_refused(fields, match):
    with pytest.raises((ConfigError, ValueError), match=match):
        tables.family("uniform", 6, **fields)
    with pytest.raises(ValueError, match="no setting 'curriculum_sequences'"):
        tables.family("masked", 6, curriculum_sequences=5)
    with pytest.raises(ValueError, match="low < high"):
        objectives.make("uniform", curriculum_interval=(0.9, 0.1))


SPACE = TokenSpace(50, 128, 0, 4, 5, (0, 1, 2, 3, 4))


def build(topology):
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer

    shape = ModelConfig(
        num_layers=1, hidden_size=16, num_attention_heads=2, init_std=0.2, time_conditioning=True
    )
    model = Transformer(shape, SPACE, topology)
    initialize(model, seed=3)
    return model


def test_a_mix_embeds_to_the_weighted_sum_and_so_does_its_gradient(topology):
    embedding = build(topology).embedding.double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 50, (2, 7, 3), generator=generator)
    mix = torch.rand(2, 7, 3, dtype=torch.float64, generator=generator)
    up = torch.randn(2, 7, 16, dtype=torch.float64, generator=generator)
    (embedding(ids, mix) * up).sum().backward()
    dense = torch.zeros(2, 7, 128, dtype=torch.float64).scatter_add(2, ids, mix)
    torch.testing.assert_close(embedding(ids, mix), dense @ embedding.weight)
    expected = torch.einsum("bsv,bsh->vh", dense, up)
    torch.testing.assert_close(embedding.weight.grad, expected)


def test_a_one_hot_mix_is_the_token_bit_for_bit(topology):
    """tau -> 0: the softened forward pass is the hard one."""
    model = build(topology)
    ids = torch.randint(5, 50, (2, 7, 2), generator=torch.Generator().manual_seed(0))
    mix = torch.tensor([1.0, 0.0]).expand(2, 7, 2)
    given = (torch.arange(7)[None], AttentionRule("bidirectional"), torch.ones(2))
    assert torch.equal(model(ids, *given, mix=mix), model(ids[..., 0], *given))


def test_soft_inputs_reach_the_loss_through_the_module(topology):
    """The same batch with its argmax alone gives another loss, and both have gradients."""
    from pretrain.module import ObjectiveModule

    config = objectives.make(
        name="uniform", time_window=8, curriculum_sequences=100, curriculum_temperature=(0.3, 0.3)
    )
    module = ObjectiveModule(build(topology), build_objective(config, SPACE))
    x = tables.clean_batch(np.random.default_rng(0).integers(40, size=(8, 6)))
    clean = replace(x, tokens=x.tokens + 8)
    batch = module.objective.corrupt(clean, NoiseKey(1, clean.position))
    hard = replace(batch, ids=batch.ids[..., 0], mix=None)
    losses = [module(batch), module(hard)]
    assert abs(float((losses[0] - losses[1]).detach())) > 1e-4
    losses[0].backward()
    assert float(module.model.embedding.weight.grad.norm()) > 0
