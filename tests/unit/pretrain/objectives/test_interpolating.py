"""Uniform and interpolating diffusion: identities of the papers against our own functions."""

import itertools
import math

import numpy as np
import pytest
import tables
import torch

from pretrain.config import ObjectiveConfig
from pretrain.errors import ConfigError
from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import SCHEDULES
from pretrain.objectives.divergence import divergence

MIXTURES = ["masked", "low_uniform", "balanced", "high_uniform", "uniform", "hybrid"]


def noised(name, k, **fields):
    """The uniform objective, or an interpolating one of the given noise."""
    if name == "duo":
        return tables.family("uniform", k, **fields)
    return tables.family("interpolating", k, noise=name, **fields)


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
    family = noised(name, k)
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
    family = noised("duo", k)
    p = np.random.default_rng(1).dirichlet(np.ones(k))
    for z, x in ((2, 2), (2, 4)):
        q = posterior(np.eye(k)[x], z, a + dt, a, k)
        kl = (q * np.log(q / posterior(p, z, a + dt, a, k))).sum() / dt
        got = tables.terms(family, family.process, 1 - a, [[x]], [[z]], p)[0, 0]
        np.testing.assert_allclose(got, kl, rtol=2e-5)


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_terms_are_never_negative_and_vanish_at_the_truth(name):
    rng, k = np.random.default_rng(2), 7
    family = noised(name, k)
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
    family = noised(name, k)
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
        family = noised(name, k, **({"uniform_share": share} if name == "hybrid" else {}))
        for t in (0.05, 0.2, 0.7):
            p = rng.dirichlet(np.ones(k))
            got = tables.terms(family, family.process, t, [[2, 2]], [[-1, 2]], [p, p])[0]
            np.testing.assert_allclose(got[0], -math.log(p[2]) / t, rtol=1e-6)
            assert got[1] < 1e-5


def test_unweighted_masked_surrogate_is_alpha_ce():
    """`simple` drops 1/p(lambda): alpha CE at <mask>; nothing at clean tokens."""
    k = 6
    family = noised("masked", k, loss="simple")
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
    family = noised(name, 5)
    bound = tables.exact_bound(
        family, family.process, [1], lambda z, q: np.full((*z.shape, 5), 0.2), n=300
    )
    assert abs(bound - math.log(5)) < 1e-6


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_bound_is_minus_log_p_with_the_leave_one_out_predictive(name):
    """One token and two dependent tokens: no gap for any sequence, no truncation term missing."""
    rng, k = np.random.default_rng(7), 3
    family = noised(name, k)
    prior = rng.dirichlet(np.ones(k))
    for x in range(k):
        bound = tables.exact_bound(
            family, family.process, [x], lambda z, q: np.broadcast_to(prior, (*z.shape, k))
        )
        assert abs(bound + math.log(prior[x])) < 2e-5
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    for x in ((0, 0), (1, 2), (2, 0)):
        bound = tables.exact_bound(
            family, family.process, x, lambda z, q: tables.leave_one_out(joint, z, q), n=120
        )
        assert abs(bound + math.log(joint[x])) < 2e-5


@pytest.mark.parametrize("name", ["duo", *MIXTURES])
def test_the_ordinary_posterior_gives_a_loose_bound_unless_noise_is_mask(name):
    """The regression test of the leave-one-out fact: a table of p(x^l | z) must fail."""
    rng, k = np.random.default_rng(8), 3
    family = noised(name, k)
    joint = rng.dirichlet(np.ones(k * k)).reshape(k, k)
    expected = 0.0
    for x in itertools.product(range(k), repeat=2):
        bound = tables.exact_bound(
            family, family.process, x, lambda z, q: tables.posterior(joint, z, q), n=60
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
    family, k = noised("duo", 7), 7
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
    family = noised("hybrid", k, uniform_share=share)
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


@pytest.mark.parametrize(
    ("name", "loss"),
    [("duo", "simple"), ("balanced", "cross_entropy"), ("hybrid", "cross_entropy")],
)
def test_given_that_a_token_gave_way_its_posterior_is_the_leave_one_out_predictive(name, loss):
    """So cross-entropy on noised tokens (accidental hits included) has the bound's minimiser.

    Counted from our own forward process: p(x^1 | z^2, z^1, noised^1) does not depend on z^1.
    """
    k, n = 3, 100_000
    family = noised(name, k, loss=loss)
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
    family = noised(name, k)
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
    family = noised("hybrid", k, loss="dynamic", uniform_share=share)
    clean = tables.clean_batch(np.random.default_rng(5).integers(k, size=(500, 8)))
    batch = family.corrupt(clean, NoiseKey(1, clean.position))
    z, x = batch.ids.flatten(), clean.tokens.flatten()
    alpha = batch.extra["alpha"].numpy()
    clean_weight = 2 * share / (1 - share) / (k + 1) * np.exp(-np.log(alpha / (1 - alpha)) / 2)
    expected = np.where(z == 1, 2.0, np.where(z == x, np.minimum(clean_weight, 2), 1.0))
    np.testing.assert_allclose(batch.weight.numpy(), expected, rtol=1e-6)
    with pytest.raises(ConfigError, match="hybrid"):
        noised("balanced", k, loss="dynamic")


def test_dynamic_weights_exceed_the_exact_ratio_as_far_as_the_literature_says():
    """Clean to noise is too large by sqrt((t + c) / t): 1.58, 1.27 and 1.12 at t = .1, .4, .8."""
    k = 50_000
    family = noised("hybrid", k, loss="dynamic", uniform_share=0.2)
    for t, excess in ((0.1, 1.58), (0.4, 1.27), (0.8, 1.12)):
        marginal = family.process.marginal(torch.full((1, 1), t, dtype=torch.float64))
        clean = tables.clean_batch([[3, 3]])
        noisy = torch.tensor([[3, 4]]) + tables.FIRST
        dynamic = family._dynamic_weight(clean, noisy, marginal)[0]
        exact = marginal.clean_weight / marginal.noise_weight
        assert float(dynamic[0] / dynamic[1] / exact) == pytest.approx(excess, abs=0.006)


def test_simple_weights_are_the_exact_ones_times_t_1_minus_t():
    for name in ("balanced", "hybrid"):
        exact, simple = noised(name, 6), noised(name, 6, loss="simple")
        clean = tables.clean_batch(np.random.default_rng(5).integers(6, size=(64, 8)))
        a, b = (f.corrupt(clean, NoiseKey(1, clean.position)) for f in (exact, simple))
        assert torch.equal(a.ids, b.ids)
        ratio = (b.weight.double() / a.weight.double()).view(64, 8)
        torch.testing.assert_close(ratio, ratio[:, :1].expand(64, 8), rtol=1e-5, atol=0)
        assert float(ratio.max()) <= 0.25 + 1e-6


def test_independent_levels_belong_to_their_share_of_sequences():
    family = noised("uniform", 6, independent_levels=0.5)
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
    family = noised(name, k)
    clean = tables.clean_batch(np.random.default_rng(11).integers(k, size=(n, 4)))
    batch = family.corrupt(clean, NoiseKey(2, clean.position))
    rows = len(batch.targets)
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(rows, k + 2, dtype=torch.float64, generator=generator)
    logits[:, :2] = -torch.inf
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    weight = batch.weight.double()
    (divergence(VocabChunk(a), batch.targets, batch.extra) * weight).sum().backward()

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
        got_log_p, got = VocabChunk(mine).log1p_terms(ids, rho)
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
    (VocabChunk(entropy).cross_entropy(ids[:, 0]) * u[0]).sum().backward()
    (
        torch.nn.functional.cross_entropy(reference, ids[:, 0], reduction="none") * up[0]
    ).sum().backward()
    torch.testing.assert_close(entropy.grad.double(), reference.grad, **tolerance)


def test_settings_of_other_families_are_refused():
    with pytest.raises(ConfigError, match=r"does not read .*uniform_share"):
        tables.family("uniform", 4, uniform_share=0.1)
    with pytest.raises(ConfigError, match="noise"):
        tables.family("masked", 4, noise="uniform")
    assert ObjectiveConfig(name="uniform").loss == "elbo"
