"""The Gaussian latent of uniform noise against 30-digit quadrature and against all K normals."""

import math

import mpmath
import numpy as np
import pytest
import torch

from pretrain.noise.duality import Duality, GaussianTime, duality_schedule
from pretrain.noise.key import NoiseKey
from pretrain.noise.latent import largest_normals, soft_tokens


def of_gamma(gamma, k):
    """T at gamma = -log SNR."""
    return float(Duality(k).alpha(torch.tensor(math.exp(-gamma / 2), dtype=torch.float64)))


def same_mean(a, b):
    error = (a.double().var(dim=0) / len(a) + b.double().var(dim=0) / len(b)).sqrt()
    return bool(((a.double().mean(dim=0) - b.double().mean(dim=0)).abs() <= 4 * error).all())


@pytest.mark.parametrize("k", [2, 50257])
@pytest.mark.parametrize("mu", [1e-6, 0.5, 4.0, 9.0])
def test_transformation_and_slope_keep_every_digit_at_both_ends(k, mu):
    """alpha at tiny signal, 1 - alpha at large signal, and the derivative, to 1e-13 relative."""
    pdf, cdf, duality = mpmath.npdf, mpmath.ncdf, Duality(k)
    integrands = {
        "alpha": lambda u: (pdf(u - mu) - pdf(u)) * cdf(u) ** (k - 1) * k / (k - 1),
        "noise": lambda u: pdf(u - mu) * (1 - cdf(u) ** (k - 1)) * k / (k - 1),
        "slope": lambda u: pdf(u - mu) * pdf(u) * cdf(u) ** (k - 2) * k,
    }
    with mpmath.workdps(30):
        for name, integrand in integrands.items():
            expected = float(mpmath.quad(integrand, [-12, -3, 0, 2, 4, 5, 7, 10, 22], maxdegree=7))
            got = float(getattr(duality, name)(torch.tensor(mu, dtype=torch.float64)))
            assert got == pytest.approx(expected, rel=1e-13), name


def test_published_values_and_windows():
    """Anchors for the GPT-2 vocabulary, and where T runs from .95 to .05."""
    anchors = {-4: 0.9987, -3.55: 0.9455, -3: 0.5963, -2.5: 0.2380, -2: 0.0720, -1.85: 0.0493}
    for gamma, value in anchors.items():
        assert of_gamma(gamma, 50257) == pytest.approx(value, abs=5e-5 + 1e-4 * value)
    windows = {256: (-3.054, -0.202), 8192: (-3.420, -1.473), 50257: (-3.565, -1.855)}
    for k, window in windows.items():
        time = GaussianTime.between(Duality(k), (0.05, 0.95))
        assert (time.start, time.stop) == pytest.approx(window, abs=6e-4)
    closed = 2 * float(torch.special.ndtr(torch.tensor(math.exp(0.5) / math.sqrt(2)))) - 1
    assert of_gamma(-1.0, 2) == pytest.approx(closed, rel=1e-6)


@pytest.mark.parametrize("k", [3, 50257])
def test_schedule_derivative_is_that_of_automatic_differentiation(k):
    schedule = duality_schedule(k, (0.01, 0.99))
    t = torch.linspace(0.01, 0.99, 13, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (expected,) = torch.autograd.grad(alpha.sum(), t)
    torch.testing.assert_close(schedule.alpha_prime(t.detach()), expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(schedule.noise(t), 1 - alpha, rtol=1e-12, atol=1e-15)
    ends = schedule.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.99, 0.01], dtype=torch.float64))


def test_largest_normals_have_the_law_of_sorted_ones():
    """Mean, variance and covariance of the three largest of 40, within four standard errors."""
    n = 40_000
    drawn = largest_normals(40, 3, 1, NoiseKey(5, torch.arange(n)))[:, 0]
    assert (drawn.diff(dim=1) < 0).all()
    generator = torch.Generator().manual_seed(0)
    brute = torch.randn(n, 40, dtype=torch.float64, generator=generator).topk(3).values
    for moment in (lambda v: v, lambda v: v * v, lambda v: v * v.roll(1, 1)):
        assert same_mean(moment(drawn), moment(brute))
    # Of a million: the mean of the largest is int u dPhi^n, which no draw of ours could reach.
    top = largest_normals(1_000_000, 1, 1, NoiseKey(5, torch.arange(n)))[:, 0, 0]
    u = torch.linspace(-2, 12, 20001, dtype=torch.float64)
    law = (1_000_000 * torch.special.log_ndtr(u)).exp()
    mean = float((u[1:] + u[:-1]).mul(law.diff()).sum() / 2)
    assert abs(float(top.mean()) - mean) < 4 * float(top.std()) / math.sqrt(n)


ALLOWED = torch.tensor([2, 3, 5, 6, 7, 9])
"""Six ids with gaps, as an excluded id leaves them."""


def symbols(ids):
    """Numbers of ids among the allowed ones."""
    return torch.searchsorted(ALLOWED, ids.contiguous())


def draw(mu, tau, k, n=40_000, token=5, seed=1):
    x0 = torch.full((n, 1), token)
    level = torch.full((n, 1), mu, dtype=torch.float64)
    tau = torch.full_like(level, tau)
    soft = soft_tokens(x0, ALLOWED, level, tau, k, NoiseKey(seed, torch.arange(n)))
    return soft.ids[:, 0], soft.mix[:, 0]


def brute(mu, tau, n=40_000, token=5):
    """softmax(w / tau) over all ids in the same number of independent draws."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(n, len(ALLOWED), dtype=torch.float64, generator=generator)
    w[:, token == ALLOWED] += mu
    return (w / math.sqrt(1 + mu * mu) / tau).softmax(dim=-1)


def test_with_every_entry_kept_it_is_the_softmax_of_all_normals():
    """k = K - 1: weights by id have the moments of the brute force less its smallest entry."""
    mu, tau = 1.2, 0.3
    ids, mix = draw(mu, tau, 5)
    whole = brute(mu, tau)
    dense = torch.zeros(len(ids), 10, dtype=torch.float64).scatter_(1, ids, mix)[:, ALLOWED]
    kept = whole.masked_fill(whole == whole.amin(dim=1, keepdim=True), 0)
    for moment in (lambda p: p, lambda p: p * p, lambda p: p * p.roll(1, 1)):
        assert same_mean(moment(dense), moment(kept))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_largest_weights_their_ids_and_the_argmax(k):
    """Ids of the k largest in order: exact law. Weights: the rest enters by its expectation."""
    mu, tau = 1.2, 0.03
    ids, mix = draw(mu, tau, k)
    top = brute(mu, tau).topk(k)
    for slot in range(k):
        ours = torch.nn.functional.one_hot(
            torch.searchsorted(ALLOWED, ids[:, slot].contiguous()), 6
        )
        theirs = torch.nn.functional.one_hot(top.indices[:, slot], 6)
        assert same_mean(ours, theirs)
    assert all(len(set(row)) == k for row in ids[:500].tolist())
    assert ((mix.diff(dim=1) <= 0).all() and mix.sum(dim=1).max() <= 1 + 1e-12) or k == 1
    difference = mix.mean(dim=0) - top.values.mean(dim=0)
    assert difference.abs().max() < 4 * 0.5 / math.sqrt(len(mix)) + 0.01
    assert same_mean(mix, top.values) or k == 1  # with one entry drawn, the rest is all expectation


@pytest.mark.parametrize("gamma", [-3.0, -1.0, 1.0])
def test_the_argmax_is_uniform_noise_at_the_transformed_level(gamma):
    """P(argmax = x) = T + (1 - T) / K, every other id alike (the reference labels by top-k)."""
    mu = math.exp(-gamma / 2)
    ids, _ = draw(mu, 1e-3, 2, n=100_000)
    counts = np.bincount(symbols(ids[:, 0]).numpy(), minlength=6) / len(ids)
    alpha = of_gamma(gamma, 6)
    expected = (1 - alpha) / 6 + alpha * (ALLOWED == 5).double().numpy()
    error = np.sqrt(expected * (1 - expected) / len(ids))
    assert (np.abs(counts - expected) < 4 * error).all()


def test_cold_softmax_is_one_hot():
    _, mix = draw(2.0, 1e-6, 2)
    hot = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert float((mix.float() == hot.float()).all(dim=1).double().mean()) > 0.99
    _, warm = draw(2.0, 1e3, 5)
    torch.testing.assert_close(warm, torch.full_like(warm, 1 / 6), rtol=2e-2, atol=0)
