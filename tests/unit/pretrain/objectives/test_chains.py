"""Whole chains of steps: the discrete-time bound, predictor-corrector steps, any-order passes."""

import itertools
import math

import numpy as np
import pytest
import tables
import torch

from pretrain.batch import AttentionRule
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives import build_objective
from pretrain.vocabulary import TokenSpace

K = 3
JOINT = np.random.default_rng(5).dirichlet(np.ones(K * K) * 0.6).reshape(K, K)
NOISES = ["masked", "balanced", "uniform", "hybrid"]


def process_of(noise):
    return tables.family("interpolating", K, noise=noise).process


def reverse(process, prediction, z, t, s):
    """p(z_s | z_t, prediction) over [<mask>, symbols...] for symbols z [n] (-1 is <mask>)."""
    n = len(z)
    x_theta = torch.zeros(n, process.space.padded_vocab_size, dtype=torch.float64)
    x_theta[:, tables.FIRST :] = torch.as_tensor(prediction)
    ids = torch.as_tensor(np.where(z < 0, 1, z + tables.FIRST))
    times = [torch.full((n,), float(v), dtype=torch.float64) for v in (t, s)]
    return process.reverse(x_theta, ids, *times).numpy()[:, 1:]


def discrete_bound(process, steps):
    """E_x sum over T steps of E_z_t KL(q(z_s | z_t, x) || p(z_s | z_t)), two tokens, exact."""
    total, grid = 0.0, np.linspace(1, 0, steps + 1)
    z = tables.all_sequences(np.arange(-1, K), 2)
    for t, s in itertools.pairwise(grid):
        q = tables.kernel(process, t)
        for x in itertools.product(range(K), repeat=2):
            probability = q[x[0], z[:, 0]] * q[x[1], z[:, 1]]
            live = z[probability > 0]
            predicted = tables.leave_one_out(JOINT, live, q)
            kl = np.zeros(len(live))
            for l in range(2):
                true = reverse(process, np.eye(K)[[x[l]] * len(live)], live[:, l], t, s)
                model = reverse(process, predicted[:, l], live[:, l], t, s)
                ratio = np.where(true > 0, true, 1) / np.where(true > 0, model, 1)
                kl += (true * np.log(ratio)).sum(axis=1)
            total += JOINT[x] * float(probability[probability > 0] @ kl)
    return total


@pytest.mark.parametrize("noise", NOISES)
def test_the_bound_of_a_chain_falls_from_the_marginals_to_the_joint_entropy(noise):
    """One step draws tokens apart (the sum of marginal entropies); more steps come nearer to the
    joint entropy, with a gap that halves as the steps double (with hybrid noise, whose mass goes
    as the root of t, it falls by that root)."""
    process = process_of(noise)
    bounds = [discrete_bound(process, steps) for steps in (1, 2, 4, 8, 16, 32)]
    marginals = tables.entropy(JOINT.sum(axis=0)) + tables.entropy(JOINT.sum(axis=1))
    entropy = tables.entropy(JOINT)
    assert bounds[0] == pytest.approx(marginals, abs=1e-9)
    assert all(a > b > entropy for a, b in itertools.pairwise(bounds))
    ratio = math.sqrt(0.5) if noise == "hybrid" else 0.5
    assert (bounds[-1] - entropy) / (bounds[-2] - entropy) == pytest.approx(ratio, abs=0.1)


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_steps_mixed_with_fresh_noise_keep_the_marginal(noise, kappa):
    """A predictor-corrector step takes the reverse kernel with probability kappa and noises the
    clean token anew otherwise; with the true token it leaves q_s as it is."""
    process, t, s, x = process_of(noise), 0.7, 0.4, 1
    # Rolled: <mask> first, as z = -1 is.
    q_t, q_s = (np.roll(tables.kernel(process, time)[x], 1) for time in (t, s))
    live = np.arange(-1, K)[q_t > 0]
    step = kappa * reverse(process, np.eye(K)[[x] * len(live)], live, t, s) + (1 - kappa) * q_s
    np.testing.assert_allclose(q_t[q_t > 0] @ step, q_s, atol=1e-12)


def test_a_masked_corrector_remasks_with_probability_sigma():
    """kappa = 1 - sigma / (1 - alpha_s) on masked noise is ReMDM's kernel (arXiv 2503.00307)."""
    process, t, s, sigma = process_of("masked"), 0.7, 0.4, 0.2
    alpha_t, alpha_s = 1 - t, 1 - s
    kappa = 1 - sigma / (1 - alpha_s)
    one_hot = np.eye(K)[[1, 1]]
    back = reverse(process, one_hot, np.array([1, -1]), t, s)
    mixed = kappa * back + (1 - kappa) * np.roll(tables.kernel(process, s)[1], 1)
    assert mixed[0, 0] == pytest.approx(sigma)  # a visible token is masked again
    stays = (1 - alpha_s - sigma * alpha_t) / (1 - alpha_t)
    assert mixed[1, 0] == pytest.approx(stays)


def test_masked_bound_of_a_network_is_its_mean_over_all_orders(topology):
    """Three any-order passes a sequence, averaged over all orders, equal the bound of the same
    network within its error: also where its conditionals contradict one another. A mixture over
    orders can only be the better code."""
    from pretrain.model.initialize import initialize
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule

    space = TokenSpace(9, 16, 0, 1, 5, (0, 1, 2, 3, 4))
    config = ModelConfig(
        num_layers=2, hidden_size=16, num_attention_heads=2, vocab_multiple=16, init_std=0.6
    )
    model = Transformer(config, space, topology)
    initialize(model, seed=1)
    x, n = torch.tensor([6, 8, 7]), 20_000
    family = build_objective(objectives.make(name="masked", time_window=64), space)
    module = ObjectiveModule(model, family).eval()
    clean = tables.clean_batch(x.expand(n, -1) - tables.FIRST)
    with torch.no_grad():
        bounds = module(family.bound_batch(clean, NoiseKey(2, clean.position)), exact=True)
        codes = torch.tensor(
            [_in_order(model, space, x, o) for o in itertools.permutations(range(3))]
        )
    error = float(bounds.std()) / math.sqrt(n)
    assert abs(float(bounds.mean()) - float(codes.mean())) < 4 * error
    assert 4 * error < float(codes.std())  # the orders really differ
    assert -float((-codes).exp().mean().log()) < float(codes.mean())


def _in_order(model, space, x, order):
    """-log p of x when its tokens are revealed in this order, one a pass."""
    ids, total = torch.full((1, len(x)), space.mask_id), 0.0
    for place in order:
        hidden = model(ids, torch.arange(len(x))[None], AttentionRule("bidirectional"))
        total -= float(model.vocabulary(hidden[place]).logits.double()[0].log_softmax(0)[x[place]])
        ids[0, place] = x[place]
    return total
