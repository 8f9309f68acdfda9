"""Uniform and interpolating diffusion: identities of the papers against our own functions."""

import itertools
import math

import numpy as np
import pytest
import tables
import torch

from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import SCHEDULES

MIXTURES = ["masked", "low_uniform", "balanced", "high_uniform", "uniform", "hybrid"]


def nodes(name):
    """Of the quadrature over time: hybrid noise, steep at both ends, takes more."""
    return 250 if name == "hybrid" else 60


def duo_reference(p, z, x, a, da, k):
    """The Duo integrand as its code writes it (arXiv 2506.10892)."""
    xb, same = k * a * p + 1 - a, float(x == z)
    other, kappa = 1 - same, (1 - a) / (k * a + 1 - a)
    first = k / (1 - a + k * a * same) - k / xb[z]
    second = (kappa * same + other) * (np.log(xb).sum() - k * np.log(xb[z]))
    second += k * a / (1 - a) * other * (np.log(xb[x]) - np.log(xb[z]))
    third = ((k - 1) * kappa * same - other / kappa) * np.log(kappa)
    return da / (k * a) * (first + second - third)


def duo_log1p(p, z, x, a, da, k):
    """The same in its cancellation-free form."""
    rho, same = k * a / (1 - a), x == z
    g = np.log1p(rho * p)
    first = k / (1 - a) * (1 / (1 + rho * same) - 1 / (1 + rho * p[z]))
    second = (g.sum() - k * g[z]) * (1 / (1 + rho) if same else 1)
    second += 0 if same else rho * (g[x] - g[z])
    third = np.log1p(rho) * (-(k - 1) / (1 + rho) if same else 1 + rho)
    return da / (k * a) * (first + second - third)


@pytest.mark.parametrize("name", ["duo", "uniform"])
def test_uniform_terms_equal_the_duo_integrand_pointwise(name):
    """Our unified closed form, the published one, its log1p form, and the uniform limit of GIDD."""
    rng, k = np.random.default_rng(0), 7
    family = tables.noised(name, k)
    for t, x, z in itertools.product((0.01, 0.3, 0.63, 0.99), (2,), (2, 4)):
        p = rng.dirichlet(np.ones(k))
        got = tables.terms(family, family.process, t, [[x]], [[z]], p)[0, 0]
        a = 1 - t
        np.testing.assert_allclose(got, duo_reference(p, z, x, a, -1.0, k), rtol=1e-9)
        np.testing.assert_allclose(got, duo_log1p(p, z, x, a, -1.0, k), rtol=1e-9)
        assert got >= 0


def posterior(x, z, as_, at, k):
    zo, ats = np.eye(k)[z], at / as_
    top = k * at * zo * x + (ats - at) * zo + (as_ - at) * x + (1 - ats) * (1 - as_) / k
    return top / (k * at * x[z] + 1 - at)


def test_uniform_terms_are_the_kl_of_an_infinitesimal_step():
    k, a, dt = 7, 0.37, 1e-6
    family = tables.noised("duo", k)
    p = np.random.default_rng(1).dirichlet(np.ones(k))
    for z, x in ((2, 2), (2, 4)):
        q = posterior(np.eye(k)[x], z, a + dt, a, k)
        kl = (q * np.log(q / posterior(p, z, a + dt, a, k))).sum() / dt
        got = tables.terms(family, family.process, 1 - a, [[x]], [[z]], p)[0, 0]
        np.testing.assert_allclose(got, kl, rtol=2e-5)


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_terms_are_never_negative_and_vanish_at_the_truth(name):
    rng, k = np.random.default_rng(2), 7
    family = tables.noised(name, k)
    for t in (1e-4, 0.01, 0.4, 0.99, 1 - 1e-4):
        x, z = rng.integers(k, size=(200, 1)), rng.integers(-1, k, size=(200, 1))
        if name in ("masked",):
            z[:] = -1
        if name in ("duo", "uniform"):
            z = abs(z)
        p = rng.dirichlet(np.ones(k), size=200)
        terms = tables.terms(family, family.process, t, x, z, p)
        scale = abs(terms).max()
        assert terms.min() > -1e-10 * scale
        truth = np.full((200, k), 1e-300)
        truth[np.arange(200), x[:, 0]] = 1
        exact = tables.terms(family, family.process, t, x, z, truth)
        assert abs(exact).max() < 1e-9 * scale


@pytest.mark.parametrize("name", MIXTURES)
def test_terms_equal_the_definition_with_explicit_distributions(name):
    """w [KL + IS] summed symbol by symbol over the whole simplex, <mask> included."""
    rng, k = np.random.default_rng(3), 6
    family = tables.noised(name, k)
    for t, x in itertools.product((0.02, 0.4, 0.97), (0, 3)):
        q_all = tables.kernel(family.process, t)
        alpha = float(family.process.masses(torch.tensor(t, dtype=torch.float64))[0])
        p = rng.dirichlet(np.ones(k))
        q, r = q_all[x], q_all[(x + 1) % k, x]
        q_theta = np.append(alpha * p + r, q[-1])
        h = 1e-6
        after, before = (tables.kernel(family.process, t + s * h) for s in (1, -1))
        a_after, a_before = (
            float(family.process.masses(torch.tensor(t + s * h, dtype=torch.float64))[0])
            for s in (1, -1)
        )
        for z in range(-1, k):
            if q[z] <= 0 or (name == "masked" and z == x):
                continue
            row = next(v for v in range(k) if v != z)  # gives the noise mass of z, no survival
            rate = alpha * (after[row, z] / a_after - before[row, z] / a_before) / (2 * h)
            keep = q > 0
            kl = (q[keep] * np.log(q[keep] / q_theta[keep])).sum()
            ratio = q[z] / q_theta[z]
            expected = rate / q[z] * (kl + ratio - math.log(ratio) - 1)
            got = tables.terms(family, family.process, t, [[x]], [[z]], p)[0, 0]
            np.testing.assert_allclose(got, expected, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["masked", "hybrid"])
def test_masked_limit_is_the_masked_bound_pointwise(name):
    """CE / t at <mask>; with p_u -> 0 clean tokens contribute nothing."""
    rng, k = np.random.default_rng(4), 6
    for share in (0.0, 1e-9):
        family = tables.noised(name, k, **({"uniform_share": share} if name == "hybrid" else {}))
        for t in (0.05, 0.2, 0.7):
            p = rng.dirichlet(np.ones(k))
            got = tables.terms(family, family.process, t, [[2, 2]], [[-1, 2]], [p, p])[0]
            np.testing.assert_allclose(got[0], -math.log(p[2]) / t, rtol=1e-6)
            assert got[1] < 1e-5


def test_unweighted_masked_surrogate_is_alpha_ce():
    """`simple` drops 1/p(lambda): alpha CE at <mask>; nothing at clean tokens."""
    k = 6
    family = tables.noised("masked", k, loss="simple")
    clean = tables.clean_batch(np.random.default_rng(5).integers(k, size=(64, 8)))
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    p = np.random.default_rng(6).dirichlet(np.ones(k), size=len(batch.rows))
    chunk = tables.Chunk(p)
    loss = family.token_loss(chunk, batch.targets, batch.extra) * batch.weight
    expected = batch.extra["alpha"] * chunk.cross_entropy(batch.targets)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(batch.ids.flatten()[batch.rows], torch.full_like(batch.rows, 1))
    assert len(batch.rows) == int((batch.ids == 1).sum())


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_a_model_that_knows_nothing_has_bound_ln_k(name):
    family = tables.noised(name, 5)
    bound = tables.exact_bound(
        family, family.process, [1], lambda z, q: np.full((*z.shape, 5), 0.2), n=nodes(name)
    )
    assert abs(bound - math.log(5)) < 1e-6


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_bound_is_minus_log_p_with_the_leave_one_out_predictive(name):
    """One token and two dependent tokens: no gap for any sequence, no truncation term missing."""
    rng, k = np.random.default_rng(7), 3
    family = tables.noised(name, k)
    prior = rng.dirichlet(np.ones(k))
    for x in range(k):
        bound = tables.exact_bound(
            family,
            family.process,
            [x],
            lambda z, q: np.broadcast_to(prior, (*z.shape, k)),
            n=nodes(name),
        )
        assert abs(bound + math.log(prior[x])) < 2e-5
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    for x in ((0, 0), (1, 2), (2, 0)):
        bound = tables.exact_bound(
            family,
            family.process,
            x,
            lambda z, q: tables.leave_one_out(joint, z, q),
            n=nodes(name) // 2,
        )
        assert abs(bound + math.log(joint[x])) < 2e-5


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_the_ordinary_posterior_gives_a_loose_bound_unless_noise_is_mask(name):
    """The regression test of the leave-one-out fact: a table of p(x^l | z) must fail."""
    rng, k = np.random.default_rng(8), 3
    family = tables.noised(name, k)
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    expected = 0.0
    for x in itertools.product(range(k), repeat=2):
        bound = tables.exact_bound(
            family, family.process, x, lambda z, q: tables.posterior(joint, z, q), n=24
        )
        expected += joint[x] * bound
    gap = expected - tables.entropy(joint)
    if name == "masked":
        assert abs(gap) < 1e-4
    else:
        assert gap > 0.1


@pytest.mark.parametrize("schedule", ["cosine", "log_linear"])
def test_the_uniform_bound_does_not_depend_on_the_schedule_but_on_its_ends(schedule):
    """I17: cosine reaches both ends, as linear does. Log-linear stops at alpha = 1e-3 and public
    code begins at t = 1e-3 as well: a constant prediction of 7 symbols is then 0.33 % too low."""
    family, k = tables.noised("duo", 7), 7
    process = type(family.process)(family.space, SCHEDULES[schedule])
    prior = np.full(k, 1 / k) if schedule == "log_linear" else np.arange(1, k + 1) / 28

    def predict(z, q):
        return np.broadcast_to(prior, (*z.shape, k))

    if schedule == "cosine":
        for x in (0, 3, 6):
            bound = tables.exact_bound(family, process, [x], predict)
            assert abs(bound + math.log(prior[x])) < 1e-5
        return
    nodes, weights = np.polynomial.legendre.leggauss(300)
    total = 0.0
    for v, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        t = 1e-3 + (1 - 1e-3) * v**3  # finer at the clean end
        z = np.arange(k)[:, None]
        each = tables.terms(family, process, t, np.zeros((k, 1), int), z, predict(z, None))
        total += weight * 3 * v * v * float(tables.kernel(process, t)[0, :k] @ each[:, 0])
    assert total / math.log(k) == pytest.approx(1 - 0.0033, abs=1e-4)


def test_cutting_hybrid_noise_at_both_ends_would_drop_what_the_literature_drops():
    """I10: levels below 1e-4 hold 1 to 10 times B sqrt(1e-4) nats of the entropy; ours has all."""
    k, share = 6, 0.2
    family = tables.noised("hybrid", k, uniform_share=share)
    prior = np.random.default_rng(12).dirichlet(np.ones(k))
    x, z = (a.ravel()[:, None] for a in np.meshgrid(np.arange(k), np.arange(-1, k), indexing="ij"))
    predicted = np.broadcast_to(prior, (len(x), 1, k))

    def bound(low):
        ends = [2 / np.pi * np.arcsin(np.sqrt(e)) for e in (low, 1 - low)]
        nodes, weights = np.polynomial.legendre.leggauss(300)
        total = 0.0
        for v, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
            v = ends[0] + (ends[1] - ends[0]) * v
            t = math.sin(math.pi * v / 2) ** 2
            q = np.roll(tables.kernel(family.process, t), 1, axis=1)
            each = tables.terms(family, family.process, t, x, z, predicted)[:, 0]
            speed = math.pi / 2 * math.sin(math.pi * v) * (ends[1] - ends[0])
            total += weight * speed * float((prior[x] * q[x, z + 1])[:, 0] @ each)
        return total

    entropy = tables.entropy(prior)
    assert bound(0.0) == pytest.approx(entropy, abs=1e-4)
    missed = (entropy - bound(1e-4)) / (2 * share / (1 - share) * 1e-2)
    assert 1 < missed < 10


def test_settings_of_other_families_are_refused():
    with pytest.raises(ValueError, match="no setting 'uniform_share', which is one of interpol"):
        tables.family("uniform", 4, uniform_share=0.1)
    with pytest.raises(ValueError, match="no setting 'noise'"):
        tables.family("masked", 4, noise="uniform")
    assert objectives.make(name="uniform").loss == "elbo"
