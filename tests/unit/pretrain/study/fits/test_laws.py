"""Laws against formulas written out by hand, and their gradients against differences."""

import math

import numpy as np
import pytest

from pretrain.study.fits.laws import (
    LAWS,
    balance,
    best_epochs,
    effective_tokens,
    optimal_params,
)

VALUES = {
    "A": 400.0,
    "B": 800.0,
    "E": 1.8,
    "alpha": 0.33,
    "beta": 0.37,
    "R_D": 20.0,
    "R_N": 6.0,
    "p": 1.4,
    "gamma": 0.45,
    "c": 200.0,
    "m": 0.4,
    "k": 0.5,
}


def values_of(law):
    return {name: VALUES[name] for name in LAWS[law].coefficients}


def points(count=60, seed=0):
    """N, D and U, among them fractions of an epoch, many epochs, models too large for U."""
    rng = np.random.default_rng(seed)
    unique = 10 ** rng.uniform(6.5, 9, count)
    return 10 ** rng.uniform(6, 9.5, count), unique * 10 ** rng.uniform(-0.5, 2.5, count), unique


def single_epoch(v, n, d, u):
    return v["E"] + v["A"] / n ** v["alpha"] + v["B"] / d ** v["beta"]


def data_constrained(v, n, d, u):
    fresh = min(d, u)
    gain = (v["alpha"] * v["A"] / (v["beta"] * v["B"])) ** (1 / (v["alpha"] + v["beta"]))
    used = min(n, gain * (gain * fresh) ** (v["beta"] / v["alpha"]))
    data = fresh + fresh * v["R_D"] * (1 - math.exp(-(d / fresh - 1) / v["R_D"]))
    size = used + used * v["R_N"] * (1 - math.exp(-(n / used - 1) / v["R_N"]))
    return single_epoch(v, size, data, u)


def interior_optimum(v, n, d, u):
    fresh = min(d, u)
    epochs = d / fresh
    scale = v["c"] * fresh ** v["m"] / n ** v["k"]
    fading = math.exp(-((max(0.0, epochs - 1) / scale) ** v["gamma"]))
    return single_epoch(v, n, fresh * epochs ** v["p"] * fading, u)


def coupled(v, n, d, u):
    size, data = v["A"] / n ** v["alpha"], v["B"] / min(d, u) ** v["beta"]
    return v["E"] + (size ** (1 / v["beta"]) + data ** (1 / v["beta"])) ** v["beta"]


@pytest.mark.parametrize("law", LAWS)
def test_a_law_is_its_formula(law):
    by_hand = {f.__name__: f for f in (single_epoch, data_constrained, interior_optimum, coupled)}
    at = points()
    expected = [by_hand[law](VALUES, *point) for point in zip(*at, strict=True)]
    np.testing.assert_allclose(LAWS[law].loss(values_of(law), *at), expected, rtol=1e-12)


@pytest.mark.parametrize("law", LAWS)
def test_gradients_are_those_of_finite_differences(law):
    values, at, step = values_of(law), points(), 1e-6
    loss, gradient = LAWS[law].gradient(values, *at)
    np.testing.assert_allclose(loss, LAWS[law].loss(values, *at), rtol=1e-12)
    assert set(gradient) == set(values)
    for name, value in values.items():
        up, down = ({**values, name: value * math.exp(sign * step)} for sign in (1, -1))
        slope = (LAWS[law].loss(up, *at) - LAWS[law].loss(down, *at)) / (2 * step)
        np.testing.assert_allclose(gradient[name], slope, atol=1e-8, err_msg=name)


@pytest.mark.parametrize("law", LAWS)
def test_coefficients_of_resamples_broadcast(law):
    at = points(7)
    several = {name: np.array([[value], [value * 1.1]]) for name, value in values_of(law).items()}
    found = LAWS[law].loss(several, *at)
    assert found.shape == (2, 7)
    np.testing.assert_array_equal(found[0], LAWS[law].loss(values_of(law), *at))


def test_one_epoch_of_a_small_model_is_the_single_epoch_law():
    tokens = np.geomspace(1e8, 1e11, 9)
    size = 0.5 * optimal_params(VALUES, tokens)
    expected = LAWS["single_epoch"].loss(values_of("single_epoch"), size, tokens, tokens)
    for law in ("data_constrained", "interior_optimum"):
        found = LAWS[law].loss(values_of(law), size, tokens, tokens)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_repeats_are_worth_at_most_r_d_budgets():
    few = effective_tokens(VALUES, 1.01e8, 1e8)
    assert few == pytest.approx(1.01e8, rel=1e-4)
    assert effective_tokens(VALUES, 1e14, 1e8) == pytest.approx(1e8 * 21)


def test_optimal_params_minimise_the_loss_at_their_compute():
    tokens = 1e9
    size = float(optimal_params(VALUES, tokens))
    flops = 6 * size * tokens
    sizes = size * np.linspace(0.5, 2, 3001)
    losses = LAWS["single_epoch"].loss(VALUES, sizes, flops / (6 * sizes), 1e30)
    assert sizes[losses.argmin()] == pytest.approx(size, rel=1e-3)
    gain = float(balance(VALUES))
    a = VALUES["beta"] / (VALUES["alpha"] + VALUES["beta"])
    assert size == pytest.approx(gain * (flops / 6) ** a)


@pytest.mark.parametrize(("params", "unique"), [(1e7, 1e7), (4e8, 1e8), (1e9, 1e9)])
def test_best_epochs_have_the_lowest_loss(params, unique):
    values = values_of("interior_optimum")
    best = best_epochs(values, params, unique)
    epochs = best * np.geomspace(0.5, 2, 4001)
    losses = LAWS["interior_optimum"].loss(values, params, unique * epochs, unique)
    assert epochs[losses.argmin()] == pytest.approx(best, rel=1e-3)


def test_one_epoch_is_best_where_repetition_never_helps():
    values = {**values_of("interior_optimum"), "c": 1e-6}
    assert best_epochs(values, 1e9, 1e7) == 1
