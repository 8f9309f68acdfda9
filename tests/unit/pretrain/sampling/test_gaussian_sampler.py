"""The chain of Gaussian diffusion: its kernel, and where it ends with an exact posterior."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import Level
from pretrain.objectives import build_objective
from pretrain.sampling.gaussian import reverse, sample_gaussian
from pretrain.vocabulary import TokenSpace

FIRST, K = 2, 3
SPACE = TokenSpace(FIRST + K, FIRST + K + 1, 0, 1, FIRST, (0, 1))
POINTS = torch.tensor([[math.cos(a), math.sin(a)] for a in (0.3, 1.9, 4.5)], dtype=torch.float64)
PAIRS = torch.from_numpy(np.random.default_rng(2).dirichlet(np.ones(K * K) * 0.7).reshape(K, K))


def test_the_kernel_is_the_gaussian_posterior_and_its_kl_the_bounds_increment():
    gamma_s, gamma_t = torch.tensor(-0.3).double(), torch.tensor(2.4).double()
    s, t = Level(gamma_s), Level(gamma_t)
    z, e = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0)).double()
    mean, deviation = reverse(z, e, gamma_t, gamma_s)
    # Bayes' rule on z_t = a z_s + noise of variance v, z_s = alpha_s e + noise.
    a = t.alpha / s.alpha
    v = t.sigma**2 - a**2 * s.sigma**2
    precision = 1.0 / s.sigma**2 + a**2 / v
    torch.testing.assert_close(deviation**-2, precision)
    want = (s.alpha * e / s.sigma**2 + a * z / v) / precision
    torch.testing.assert_close(mean, want)
    other, _ = reverse(z, e + 0.37, gamma_t, gamma_s)
    kl = 0.5 * ((other - mean) / deviation) ** 2
    increment = 0.5 * (torch.exp(-gamma_s) - torch.exp(-gamma_t)) * 0.37**2
    torch.testing.assert_close(kl, increment.expand(1000))


class Language(nn.Module):
    """Knows log p(x^l | z of the other token) of PAIRS; z comes in as the network scales it."""

    def __init__(self, topology):

        super().__init__()
        self.config = SimpleNamespace(hidden_size=2, time_conditioning=False)
        self.space, self.topology, self.gamma = SPACE, topology, None

    def forward(self, ids, positions, rule, carried, dropout_seed=None):
        assert rule.kind == "bidirectional" and positions.tolist() == [[0, 1]]
        return carried[0]

    def vocabulary(self, rows):
        from pretrain.model.vocab import VocabChunk

        level = Level(self.gamma[0])
        z = rows.view(-1, 2, 2) * (level.alpha**2 / 2 + level.sigma**2).sqrt()
        likelihood = (level.sharpness * z @ POINTS.t()).log_softmax(-1).exp()  # [b, 2, K]
        first, second = likelihood[:, 1] @ PAIRS.t(), likelihood[:, 0] @ PAIRS
        logits = torch.full((len(z), 2, FIRST + K + 1), -torch.inf, dtype=torch.float64)
        logits[..., FIRST : FIRST + K] = torch.stack((first, second), dim=1).log()
        return VocabChunk(logits.flatten(0, 1), self.topology)


@pytest.fixture(scope="module")
def language(topology):
    config = objectives.make(name="gaussian", embedding_size=2, end_points=(-4.0, 6.0))
    model = Language(topology)
    network = build_objective(config, SPACE).auxiliary_network(model, seed=3).double()
    with torch.no_grad():
        network.embedding.weight[FIRST : FIRST + K] = POINTS
        network.enter.weight.copy_(torch.eye(2))
    original = network.ask

    def ask(model, ids, positions, rule, z, gamma, memory):
        model.gamma = gamma
        return original(model, ids, positions, rule, z, gamma, memory)

    network.ask = ask
    return model, network


def counts(tokens):
    index = (tokens - FIRST).numpy()
    assert ((index >= 0) & (index < K)).all()
    out = np.zeros((K, K))
    np.add.at(out, tuple(index.T), 1)
    return out


def chi_square(seen, p):
    """About normal with mean 0 and deviation 1 when what was seen follows p."""
    expected = p * seen.sum()
    return float((((seen - expected) ** 2 / expected).sum() - (p.size - 1)) / np.sqrt(2 * p.size))


def test_a_chain_with_the_exact_posterior_ends_in_the_joint_distribution(language):
    n = 2000
    empty = torch.zeros(n, 0, dtype=torch.int64)
    key = NoiseKey(0, torch.arange(n))
    tokens, passes = sample_gaussian(*language, empty, key, length=2, steps=100)
    assert passes == 101
    assert abs(chi_square(counts(tokens), PAIRS.numpy())) < 4
    once, _ = sample_gaussian(*language, empty, key, length=2, steps=1)
    assert chi_square(counts(once), PAIRS.numpy()) > 10


def test_a_prompt_conditions_what_follows(language):
    n = 2000
    prompt = torch.full((n, 1), FIRST + 1)
    key = NoiseKey(1, torch.arange(n))
    tokens, _ = sample_gaussian(*language, prompt, key, length=2, steps=100)
    assert (tokens[:, 0] == FIRST + 1).all()
    follows = counts(tokens)[1]
    assert abs(chi_square(follows, (PAIRS[1] / PAIRS[1].sum()).numpy())) < 4


def test_a_sample_does_not_depend_on_its_batch(language):
    empty = torch.zeros(5, 0, dtype=torch.int64)
    whole, _ = sample_gaussian(*language, empty, NoiseKey(6, torch.arange(5)), length=2, steps=7)
    for i in range(5):
        key = NoiseKey(6, torch.tensor([i]))
        alone, _ = sample_gaussian(*language, empty[:1], key, length=2, steps=7)
        assert torch.equal(alone[0], whole[i])
