"""What uniform and interpolating diffusion train on: weights, surrogates, levels, gradients."""

import itertools
import math

import numpy as np
import pytest
import tables
import torch

from pretrain.noise.key import NoiseKey
from pretrain.objectives.divergence import divergence


@pytest.mark.parametrize(
    ("name", "loss"),
    [("duo", "simple"), ("balanced", "cross_entropy"), ("hybrid", "cross_entropy")],
)
def test_given_that_a_token_gave_way_its_posterior_is_the_leave_one_out_predictive(name, loss):
    """So cross-entropy on noised tokens (accidental hits included) has the bound's minimiser.

    Counted from our own forward process: p(x^1 | z^2, z^1, noised^1) does not depend on z^1.
    """
    k, n = 3, 100_000
    family = tables.noised(name, k, loss=loss)
    rng = np.random.default_rng(9)
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    pick = rng.choice(k * k, p=joint.ravel(), size=n)
    x = np.stack((pick // k, pick % k), axis=1)
    clean = tables.clean_batch(x)
    t = 0.5
    marginal = family.process.marginal(torch.full((n, 1), t, dtype=torch.float64))
    ids, redrawn = family.process.draw(clean.tokens, marginal, NoiseKey(1, clean.position))
    chosen = (redrawn | (ids == tables.MASK))[:, 0].numpy()
    z = np.where(ids == tables.MASK, -1, ids - tables.FIRST)
    q = tables.kernel(family.process, t)
    for z1, z2 in itertools.product(np.unique(z), repeat=2):
        here = chosen & (z[:, 0] == z1) & (z[:, 1] == z2)
        frequency = np.bincount(x[here, 0], minlength=k) / here.sum()
        expected = tables.leave_one_out(joint, np.array([[z1, z2]]), q)[0, 0]
        error = np.sqrt(expected * (1 - expected) / here.sum())
        assert (abs(frequency - expected) < 4 * error).all()
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    read, scored = batch.ids.flatten(), torch.zeros(2 * n, dtype=torch.bool)
    scored[batch.rows] = True
    assert (read == clean.tokens.flatten())[~scored].all()
    assert (batch.weight == 1).all()
    hits = read[batch.rows] == batch.targets
    assert hits.any(), "accidental hits must stay among the targets"


@pytest.mark.parametrize("name", ["duo", "balanced", "hybrid"])
def test_training_batch_and_bound_batch_estimate_the_same_bound(name):
    """Monte Carlo of both methods, through real draws, against minus log p of a known language."""
    rng, k, n = np.random.default_rng(10), 3, 30_000
    family = tables.noised(name, k)
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    clean = tables.clean_batch(np.tile([[1, 2]], (n, 1)))
    for method in ("bound_batch", "corrupt"):
        batch = getattr(family, method)(clean, NoiseKey(1, clean.position))
        z = batch.ids.numpy() - tables.FIRST
        z[batch.ids.numpy() == 1] = -1
        alpha = batch.extra["alpha"].view(n, 2)[:, :1].numpy()
        r = batch.extra["uniform"].view(n, 2)[:, :1].numpy()

        def word(l, z=z, alpha=alpha, r=r):
            """Likelihood of the other token's value under each x: [n, k]."""
            seen = z[:, 1 - l]
            flat = np.ones((n, k))
            return np.where((seen < 0)[:, None], flat, r + alpha * (np.arange(k) == seen[:, None]))

        p = np.stack((word(0) @ joint.T, word(1) @ joint), axis=1)
        p /= p.sum(axis=2, keepdims=True)
        chunk = tables.Chunk(p.reshape(-1, k))
        loss = family.token_bound(chunk, batch.targets, batch.extra) * batch.weight.double()
        each = loss.view(n, 2).sum(dim=1).numpy()
        error = each.std() / math.sqrt(n)
        assert abs(each.mean() + math.log(joint[1, 2])) < 4 * error
        assert method == "corrupt" or error < 0.05


def test_dynamic_weights_are_the_published_ones():
    """2, 1 and (B/N) e^(-lambda/2), where sigmoid(lambda) = alpha."""
    k, share = 6, 0.2
    family = tables.noised("hybrid", k, loss="dynamic", uniform_share=share)
    clean = tables.clean_batch(np.random.default_rng(5).integers(k, size=(500, 8)))
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    z, x = batch.ids.flatten(), clean.tokens.flatten()
    alpha = batch.extra["alpha"].numpy()
    clean_weight = 2 * share / (1 - share) / (k + 1) * np.exp(-np.log(alpha / (1 - alpha)) / 2)
    expected = np.where(z == 1, 2.0, np.where(z == x, np.minimum(clean_weight, 2), 1.0))
    np.testing.assert_allclose(batch.weight.numpy(), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="hybrid"):
        tables.noised("balanced", k, loss="dynamic")


def test_dynamic_weights_exceed_the_exact_ratio_as_far_as_the_literature_says():
    """Clean to noise is too large by sqrt((t + c) / t): 1.58, 1.27 and 1.12 at t = .1, .4, .8."""
    k = 50_000
    family = tables.noised("hybrid", k, loss="dynamic", uniform_share=0.2)
    for t, excess in ((0.1, 1.58), (0.4, 1.27), (0.8, 1.12)):
        marginal = family.process.marginal(torch.full((1, 1), t, dtype=torch.float64))
        clean = tables.clean_batch([[3, 3]])
        noisy = torch.tensor([[3, 4]]) + tables.FIRST
        dynamic = family._dynamic_weight(clean, noisy, marginal)[0]
        exact = marginal.clean_weight / marginal.noise_weight
        assert float(dynamic[0] / dynamic[1] / exact) == pytest.approx(excess, abs=0.006)


def test_simple_weights_are_the_exact_ones_times_t_1_minus_t():
    for name in ("balanced", "hybrid"):
        exact, simple = tables.noised(name, 6), tables.noised(name, 6, loss="simple")
        clean = tables.clean_batch(np.random.default_rng(5).integers(6, size=(64, 8)))
        a, b = (f.corrupt(clean, NoiseKey(1, clean.position)) for f in (exact, simple))
        assert torch.equal(a.ids, b.ids)
        ratio = (b.weight.double() / a.weight.double()).view(64, 8)
        torch.testing.assert_close(ratio, ratio[:, :1].expand(64, 8), rtol=1e-5, atol=0)
        assert float(ratio.max()) <= 0.25 + 1e-6


def test_independent_levels_belong_to_their_share_of_sequences():
    family = tables.noised("uniform", 6, independent_levels=0.5)
    clean = tables.clean_batch(np.zeros((4000, 8), dtype=int))
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    alpha = batch.extra["alpha"].view(4000, 8)
    own = (alpha != alpha[:, :1]).any(dim=1)
    assert abs(float(own.double().mean()) - 0.5) < 4 * 0.5 / math.sqrt(4000)
    assert batch.noise_level is None
    # Whatever a sequence draws, each position's level is uniform on (0, 1).
    for l in range(8):
        counts = np.bincount((alpha[:, l] * 20).long().numpy(), minlength=20)
        assert ((counts - 200) ** 2 / 200).sum() < 19 + 5 * math.sqrt(38)


@pytest.mark.parametrize("name", ["duo", "balanced", "masked"])
def test_hand_derived_gradient_equals_autograd(topology, name):
    """float64 gradient of the weighted loss through `VocabChunk` against autograd of explicit
    distributions over the vocabulary."""
    from pretrain.model.vocab import VocabChunk

    k, n = 11, 64
    family = tables.noised(name, k)
    clean = tables.clean_batch(np.random.default_rng(11).integers(k, size=(n, 4)))
    batch = family.corrupt(clean, NoiseKey(2, clean.position))
    rows = len(batch.targets)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, k + 2, dtype=torch.float64, generator=generator)
    logits[:, :2] = -torch.inf
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = batch.weight.double()
    (divergence(VocabChunk(a, topology), batch.targets, batch.extra) * weight).sum().backward()

    p = b.softmax(dim=-1)
    alpha, r = batch.extra["alpha"][:, None], batch.extra["uniform"][:, None]
    allowed = torch.ones(k + 2, dtype=torch.float64).index_fill(0, torch.tensor([0, 1]), 0)
    onehot = torch.nn.functional.one_hot(batch.targets, k + 2).double()
    q, q_theta = alpha * onehot + r * allowed, alpha * p + r * allowed
    positive = q > 0
    safe = torch.where(positive, q, 1.0)
    kl = (q * (safe.log() - torch.where(positive, q_theta, 1.0).log())).sum(dim=1)
    noisy = batch.extra["noisy"][:, None]
    ratio = (q.gather(1, noisy) / q_theta.gather(1, noisy))[:, 0]
    itakura = torch.where(batch.extra["noisy_is_mask"], 0.0, ratio - ratio.log() - 1)
    ((kl + itakura) * weight).sum().backward()
    assert a.grad[:, :2].abs().max() == 0
    scale = weight[:, None].clamp(min=1)
    torch.testing.assert_close(a.grad / scale, b.grad / scale, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log1p_terms_equal_the_plain_sum_and_its_gradient(topology, dtype):
    """The fused reduction against autograd, over many slices of rows and rho from 0 to 1e9."""
    from pretrain.model import vocab_functions
    from pretrain.model.vocab import VocabChunk

    generator = torch.Generator().manual_seed(1)
    n, v = 37, 300
    logits = 4 * torch.randn(n, v, dtype=torch.float64, generator=generator)
    logits[:, [3, 250]] = -torch.inf
    ids = torch.randint(4, 250, (n, 2), generator=generator)
    rho = torch.logspace(-6, 9, n, dtype=torch.float64)
    rho[0] = 0
    up = torch.randn(3, n, dtype=torch.float64, generator=generator)
    exact = logits.clone().requires_grad_()
    p = exact.softmax(dim=-1)
    log_p = exact.log_softmax(dim=-1).gather(1, ids)
    total = torch.log1p(rho[:, None] * p).sum(dim=1)
    (total * up[0] + log_p[:, 0] * up[1] + log_p[:, 1] * up[2]).sum().backward()
    previous, vocab_functions._SLICE_ON_CPU = vocab_functions._SLICE_ON_CPU, 5 * v
    try:
        mine = logits.clone().to(dtype).requires_grad_()
        got_log_p, got = VocabChunk(mine, topology).log1p_terms(ids, rho)
        u = up.to(dtype)
        (got * u[0] + got_log_p[:, 0] * u[1] + got_log_p[:, 1] * u[2]).sum().backward()
    finally:
        vocab_functions._SLICE_ON_CPU = previous
    tolerance = {"rtol": 1e-11, "atol": 1e-11} if dtype == torch.float64 else {
        "rtol": 1e-4, "atol": 1e-4
    }  # fmt: skip
    torch.testing.assert_close(got.double(), total.detach(), **tolerance)
    torch.testing.assert_close(got_log_p.double(), log_p.detach(), **tolerance)
    torch.testing.assert_close(mine.grad.double(), exact.grad, **tolerance)

    # Cross-entropy alone, in slices too.
    entropy = logits.clone().to(dtype).requires_grad_()
    reference = logits.clone().requires_grad_()
    (VocabChunk(entropy, topology).cross_entropy(ids[:, 0]) * u[0]).sum().backward()
    (
        torch.nn.functional.cross_entropy(reference, ids[:, 0], reduction="none") * up[0]
    ).sum().backward()
    torch.testing.assert_close(entropy.grad.double(), reference.grad, **tolerance)
