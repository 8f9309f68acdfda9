"""Noise processes: masses, weights against automatic differentiation, kernels against Bayes."""

import itertools
import math

import numpy as np
import pytest
import torch

from pretrain.noise.key import NoiseKey
from pretrain.noise.process import HybridProcess, MixingProcess, UniformProcess
from pretrain.noise.schedule import COSINE, LOG_LINEAR, SCHEDULES
from pretrain.vocabulary import TokenSpace

K = 6
SPACE = TokenSpace(9, 12, 0, 4, 5, (0, 1, 4))  # allowed ids 2, 3, 5, 6, 7, 8
MASK = 4
ALLOWED = [2, 3, 5, 6, 7, 8]
PROCESSES = {
    "uniform": UniformProcess(SPACE),
    "uniform cosine": UniformProcess(SPACE, COSINE),
    "uniform log-linear": UniformProcess(SPACE, LOG_LINEAR),
    "masked": MixingProcess(SPACE, -math.inf),
    "low": MixingProcess(SPACE, -2.0),
    "balanced": MixingProcess(SPACE, 0.0),
    "high": MixingProcess(SPACE, 2.0),
    "all uniform": MixingProcess(SPACE, math.inf),
    "hybrid .2": HybridProcess(SPACE, 0.2),
    "hybrid .5": HybridProcess(SPACE, 0.5),
    "hybrid 0": HybridProcess(SPACE, 0.0),
}
every_process = pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)


def times(*values):
    return torch.tensor(values, dtype=torch.float64)


def marginal_row(process, t, x):
    """q_t(. | x) over the columns of the head [v], x an id."""
    alpha, r, m = (float(v) for v in process.masses(times(t)[0]))
    q = np.zeros(SPACE.padded_vocab_size)
    q[ALLOWED] = r
    q[MASK] = m
    q[x] += alpha
    return q


def transition(process, t, s):
    """Row-stochastic Q[z_s, z_t] over allowed ids and <mask>."""
    alpha_t, r_t, m_t = (float(v) for v in process.masses(times(t)[0]))
    alpha_s, r_s, m_s = (float(v) for v in process.masses(times(s)[0]))
    survive = alpha_t / alpha_s
    gain = np.full(K + 1, r_t - survive * r_s)
    gain[K] = m_t - survive * m_s
    return survive * np.eye(K + 1) + gain[None]


@every_process
def test_masses_sum_to_one_and_the_ends_are_clean_and_noise(process):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, r, m = process.masses(t)
    torch.testing.assert_close(alpha + K * r + m, torch.ones_like(t), rtol=0, atol=1e-15)
    assert abs(float(alpha[0]) - 1) < 1e-15 and (alpha.diff() < 0).all()
    if process is not PROCESSES["uniform log-linear"]:
        assert abs(float(alpha[-1])) < 1e-15


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_hybrid_noise_holds_its_uniform_share_at_one_half(share):
    _, r, _ = HybridProcess(SPACE, share).masses(times(0.5))
    assert abs(float(K * r) - share) < 1e-14


@every_process
def test_weights_equal_automatic_differentiation(process):
    """w_t(z, x) = alpha / q_t(z|x) * d/dt (noise mass of z / alpha)."""
    t = times(1e-6, 0.05, 0.3, 0.5, 0.9, 1 - 1e-6).requires_grad_()
    alpha, r, m = process.masses(t)

    def rate(mass):
        (d,) = torch.autograd.grad((mass / alpha).sum(), t, retain_graph=True, allow_unused=True)
        return alpha * (torch.zeros_like(t) if d is None else d)

    w = process.marginal(t.detach())
    if (r > 0).any():
        torch.testing.assert_close(w.noise_weight, (rate(r) / r).detach(), rtol=1e-8, atol=0)
        clean = (rate(r) / (alpha + r)).detach()
        torch.testing.assert_close(w.clean_weight, clean, rtol=1e-8, atol=0)
    if (m > 0).any():
        torch.testing.assert_close(w.mask_weight, (rate(m) / m).detach(), rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedule_derivatives_and_weights(name):
    schedule = SCHEDULES[name]
    t = torch.linspace(0.001, 0.999, 50, dtype=torch.float64, requires_grad=True)
    alpha = schedule.alpha(t)
    (prime,) = torch.autograd.grad(alpha.sum(), t)
    t = t.detach()
    torch.testing.assert_close(schedule.alpha_prime(t), prime, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(schedule.noise(t), 1 - alpha.detach(), rtol=1e-11, atol=1e-14)
    if name != "cosine":
        torch.testing.assert_close(schedule.elbo_weight(t), 1 / t, rtol=1e-12, atol=0)


def test_hybrid_weights_have_the_published_ratios():
    """Mask to noise 2 : 1 exactly, clean to noise r / (1 + r), r = B/(N-1) sqrt(t/(1-t))."""
    for t, share in itertools.product((0.1, 0.4, 0.8), (0.1, 0.2)):
        w = HybridProcess(SPACE, share).marginal(times(t))
        assert abs(float(w.mask_weight / w.noise_weight) - 2) < 1e-12
        r = 2 * share / (1 - share) / K * math.sqrt(t / (1 - t))
        assert abs(float(w.clean_weight / w.noise_weight) - r / (1 + r)) < 1e-12


@every_process
def test_exact_weights_make_the_leave_one_out_predictive_the_optimum(process):
    """I9b: q_t(z|x) w_t(z, x) does not depend on x, so that weights turn p(x | z) into the prior.
    I11: the last reverse step multiplies by the likelihood of z, and dividing undoes it."""
    prior = np.random.default_rng(3).dirichlet(np.ones(K))
    x_theta = torch.zeros(1, SPACE.padded_vocab_size, dtype=torch.float64)
    x_theta[0, ALLOWED] = torch.from_numpy(prior)
    for t in (0.05, 0.4, 0.9):
        w = process.marginal(times(t))
        rows = np.stack([marginal_row(process, t, x) for x in ALLOWED])
        for z in (ALLOWED[1], MASK):
            word = rows[:, z]
            if word.max() == 0:
                continue
            other = float(w.mask_weight if z == MASK else w.noise_weight)
            same = ALLOWED.index(z) if z in ALLOWED else None
            weights = np.array([float(w.clean_weight) if i == same else other for i in range(K)])
            if not weights.any():
                continue  # a visible token under <mask> alone: nothing to learn there
            tilted = prior * word * weights
            np.testing.assert_allclose(tilted / tilted.sum(), prior, rtol=1e-12)
            last = process.reverse(x_theta, torch.tensor([z]), times(t), times(0.0))
            back = last[0, ALLOWED].numpy() / word
            np.testing.assert_allclose(back / back.sum(), prior, rtol=1e-12)


def test_log_snr_weights_are_the_closed_forms():
    """1 + s for mask, s for noise, (s^2/K) / (s/K + e^lambda) for clean, all times |d lambda|."""
    for shift, level in itertools.product((-2.0, 0.0, 2.0), (-4.0, -1.0, 0.0, 2.0, 5.0)):
        t = times(1 / (1 + math.exp(level)))
        w = MixingProcess(SPACE, shift).marginal(t)
        speed, s = float(t * (1 - t)), 1 / (1 + math.exp(-level - shift))
        expected = [1 + s, s, (s * s / K) / (s / K + math.exp(level))]
        got = [float(x) * speed for x in (w.mask_weight, w.noise_weight, w.clean_weight)]
        np.testing.assert_allclose(got, expected, rtol=1e-12)


def test_time_form_and_log_snr_form_have_the_same_weights_where_their_noise_is_the_same():
    """Where the masses of noise agree as functions of alpha, so do weights per d alpha."""
    t = torch.linspace(0.01, 0.99, 20, dtype=torch.float64)
    a = MixingProcess(SPACE, math.inf).marginal(t)
    b = UniformProcess(SPACE).marginal(t)
    c = MixingProcess(SPACE, -math.inf).marginal(t)
    d = HybridProcess(SPACE, 0.0).marginal(t)
    torch.testing.assert_close(a.noise_weight, b.noise_weight)
    torch.testing.assert_close(a.clean_weight, b.clean_weight)
    torch.testing.assert_close(c.mask_weight, d.mask_weight)
    assert (c.clean_weight == 0).all() and (d.clean_weight == 0).all()


@every_process
def test_transitions_are_stochastic_and_compose(process):
    """Chapman-Kolmogorov, rows that sum to one, and no negative rate at any speed of mixing."""
    whole, early, late = (transition(process, *p) for p in ((0.6, 0.1), (0.3, 0.1), (0.6, 0.3)))
    np.testing.assert_allclose(early @ late, whole, atol=1e-14)
    grid = np.linspace(0, 0.999, 30)
    for s, t in itertools.pairwise(grid):
        q = transition(process, t, s)
        assert q.min() > -1e-15
        np.testing.assert_allclose(q.sum(axis=1), 1, atol=1e-14)


@every_process
def test_reverse_kernel_is_bayes_rule_and_normalised_for_any_prediction(process):
    rng = np.random.default_rng(0)
    x_theta = np.zeros(SPACE.padded_vocab_size)
    x_theta[ALLOWED] = rng.dirichlet(np.ones(K))
    t, s = 0.7, 0.4
    ids = [*ALLOWED, MASK]
    q = transition(process, t, s)
    for zi, z in enumerate(ids):
        for x in (x_theta, np.eye(SPACE.padded_vocab_size)[6]):
            prior = sum(x[v] * marginal_row(process, s, v) for v in ALLOWED)[ids]
            joint = prior * q[:, zi]
            if joint.sum() == 0:
                continue  # z cannot occur
            got = process.reverse(torch.from_numpy(x)[None], torch.tensor([z]), times(t), times(s))
            np.testing.assert_allclose(got[0, ids].numpy(), joint / joint.sum(), atol=1e-14)
            assert abs(float(got.sum()) - 1) < 1e-14


@every_process
@pytest.mark.parametrize("kappa", [0.0, 0.4, 1.0])
def test_predictor_corrector_steps_keep_the_marginal(process, kappa):
    """kappa q(z_s | z_t, x) + (1 - kappa) q(z_s | x), whatever kappa (arXiv 2602.21185); on masked
    noise kappa = 1 - sigma / (1 - alpha_s) masks a clean token again with probability sigma."""
    ids, x, t, s = [*ALLOWED, MASK], ALLOWED[1], 0.7, 0.4
    at_t, at_s = marginal_row(process, t, x), marginal_row(process, s, x)
    truth = torch.eye(SPACE.padded_vocab_size, dtype=torch.float64)[x][None]
    total = np.zeros(SPACE.padded_vocab_size)
    for z in (z for z in ids if at_t[z] > 0):
        back = process.reverse(truth, torch.tensor([z]), times(t), times(s))[0].numpy()
        total += at_t[z] * (kappa * back + (1 - kappa) * at_s)
        if z == x and at_s[ALLOWED].sum() == at_s[x]:  # noise is <mask> alone
            again = kappa * back[MASK] + (1 - kappa) * at_s[MASK]
            assert again == pytest.approx((1 - kappa) * at_s[MASK], abs=1e-14)
    np.testing.assert_allclose(total, at_s, atol=1e-14)


@every_process
def test_a_nucleus_that_lacks_the_token_on_the_page_leaves_a_distribution(process):
    """x_theta may be zero at z (top-p, temperature 0). Where noise is <mask> alone a visible token
    is then the clean one all the same, else noise explains it."""
    ids = [*ALLOWED, MASK]
    x_theta = torch.zeros(len(ids), SPACE.padded_vocab_size, dtype=torch.float64)
    x_theta[:, 6] = 1.0
    z = torch.tensor(ids)
    for t, s in ((1.0, 0.5), (0.7, 0.4), (0.3, 0.0)):
        got = process.reverse(x_theta, z, times(*[t] * len(ids)), times(*[s] * len(ids)))
        possible = [marginal_row(process, t, v)[v] > 0 for v in ids]
        assert torch.isfinite(got[possible]).all()
        np.testing.assert_allclose(got[possible].sum(dim=1), 1, atol=1e-14)
        _, r, _ = process.masses(times(t))
        if float(r) == 0 and t < 1:
            visible = torch.eye(SPACE.padded_vocab_size, dtype=torch.float64)[z[:-1]]
            assert torch.equal(got[:-1], visible)


def test_uniform_reverse_kernel_is_the_published_closed_form():
    """UDLM, Duo: K a_t z.x + (a_t|s - a_t) z + (a_s - a_t) x + (1 - a_t|s)(1 - a_s)/K, divided by
    K a_t <z,x> + 1 - a_t."""
    rng = np.random.default_rng(1)
    x = np.zeros(SPACE.padded_vocab_size)
    x[ALLOWED] = rng.dirichlet(np.ones(K))
    at, as_ = 0.3, 0.55
    r = at / as_
    for z in ALLOWED:
        zz = np.eye(SPACE.padded_vocab_size)[z]
        closed = K * at * x * zz + (r - at) * zz + (as_ - at) * x
        closed[ALLOWED] += (1 - r) * (1 - as_) / K
        closed /= K * at * x[z] + 1 - at
        got = PROCESSES["uniform"].reverse(
            torch.from_numpy(x)[None], torch.tensor([z]), times(1 - at), times(1 - as_)
        )
        np.testing.assert_allclose(got[0].numpy(), closed, atol=1e-14)


# log-linear does not reach pure noise at t = 1
@pytest.mark.parametrize("process", [p for n, p in PROCESSES.items() if "log-linear" not in n])
def test_ancestral_chain_ends_in_the_data_for_any_number_of_steps(process):
    """One token, x_theta = the data distribution (its leave-one-out predictive): from t = 1 to
    t = 0 exactly, in 1, 3 or 20 steps, the law of the chain is the data."""
    rng = np.random.default_rng(2)
    data = np.zeros(SPACE.padded_vocab_size)
    data[ALLOWED] = rng.dirichlet(np.ones(K))
    v = SPACE.padded_vocab_size
    for steps in (1, 3, 20):
        grid = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        p = torch.from_numpy(marginal_row(process, 1.0, ALLOWED[0]))
        for t, s in itertools.pairwise(grid.tolist()):
            states = [*ALLOWED, MASK]
            rows = process.reverse(
                torch.from_numpy(np.tile(data, (K + 1, 1))),
                torch.tensor(states),
                times(*[t] * (K + 1)),
                times(*[s] * (K + 1)),
            )
            possible = p[states] > 0
            p = p[states][possible] @ rows[possible]
        assert p.shape == (v,)
        np.testing.assert_allclose(p.numpy(), data, atol=1e-12)


@pytest.mark.parametrize("name", ["uniform", "low", "balanced", "hybrid .2", "masked"])
def test_forward_noise_has_its_frequencies(name):
    """1e6 tokens: x, <mask> and every other allowed id within four standard errors; no other id."""
    process, n, s = PROCESSES[name], 1000, 1000
    noise = NoiseKey(3, torch.arange(n))
    x0 = torch.full((n, s), 6)
    marginal = process.marginal(torch.full((n, 1), 0.35, dtype=torch.float64))
    z, redrawn = process.draw(x0, marginal, noise)
    counts = np.bincount(z.flatten().numpy(), minlength=SPACE.padded_vocab_size)
    expected = marginal_row(process, 0.35, 6)
    for i, p in enumerate(expected):
        assert abs(counts[i] - n * s * p) <= 4 * math.sqrt(n * s * p * (1 - p)) + 1e-6, i
    assert (z[redrawn] != MASK).all()
    r = float(marginal.uniform[0, 0])
    share = float(redrawn.double().mean())
    assert abs(share - K * r) < 4 * math.sqrt(K * r / (n * s)) + 1e-12
