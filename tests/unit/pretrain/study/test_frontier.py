"""The frontier under U against brute force and closed-form special cases."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import balance, optimal_params
from pretrain.study.frontier import (
    best_allocation,
    contour,
    first_root,
    minimise,
    one_epoch_compute,
    outside,
    saturation,
    supported,
    turn,
    within_reach,
)

AR = Fitted(
    "data_constrained",
    {"A": 290.5, "B": 792.4, "E": 1.835, "alpha": 0.31, "beta": 0.31, "R_D": 31.2, "R_N": 55.16},
    "autoregressive",
    support={
        "params": (7e6, 2.2e9),
        "tokens": (1e8, 5e10),
        "unique_tokens": (2.5e7, 1e8),
        "epochs": (1, 500),
        "flops": (4e15, 1e20),
    },
)
QUOKKA = Fitted(
    "interior_optimum",
    {"A": 1535.23, "alpha": 0.42, "B": 54.21, "beta": 0.13, "E": 0.0}
    | {"p": 1.49, "gamma": 0.4, "c": 254.35, "m": 0.39, "k": 0.55},
    "masked",
)
CHINCHILLA = Fitted(
    "single_epoch",
    {"A": 482.01, "B": 2085.43, "E": 1.8172, "alpha": 0.3478, "beta": 0.3658},
    "autoregressive",
)


@pytest.mark.parametrize("fitted", [AR, CHINCHILLA], ids=lambda f: f.law_name)
@pytest.mark.parametrize("flops", [1e15, 1e18, 1e21])
def test_best_allocation_is_that_of_a_fine_grid(fitted, flops):
    params = np.geomspace(1e3, 1e15, 400_001)
    losses = fitted.loss(params, flops / 6 / params, 1e8)
    best = best_allocation(fitted, flops, 1e8)
    assert best.loss == pytest.approx(losses.min(), abs=1e-8)
    assert best.params == pytest.approx(params[losses.argmin()], rel=1e-3)
    assert best.tokens * best.params * 6 == pytest.approx(flops)
    assert best.epochs == pytest.approx(best.tokens / 1e8)


@pytest.mark.parametrize("flops", [1e14, 1e16, 1e18, 1e21])
def test_a_law_that_rises_spends_no_more_than_helps(flops):
    params = np.geomspace(1e5, 1e11, 801)
    spent = flops * np.geomspace(1e-5, 1, 401)[:, None]
    losses = QUOKKA.loss(params, spent / 6 / params, 1e7)
    best = best_allocation(QUOKKA, flops, 1e7)
    assert best.loss == pytest.approx(losses.min(), abs=1e-3)
    assert best.loss <= losses.min()
    assert best.tokens * best.params * 6 <= flops * (1 + 1e-12)


def test_unlimited_data_give_the_closed_form_of_the_single_epoch_law():
    values = CHINCHILLA.values
    flops = np.geomspace(1e17, 1e25, 5)
    share = values["beta"] / (values["alpha"] + values["beta"])
    expected = balance(values) * (flops / 6) ** share
    np.testing.assert_allclose(best_allocation(CHINCHILLA, flops, 1e9).params, expected, rtol=1e-4)


def test_repetition_begins_where_u_tokens_are_compute_optimal():
    unique = np.array([1e6, 1e8, 1e10])
    expected = 6 * unique * optimal_params(AR.values, unique)
    np.testing.assert_allclose(one_epoch_compute(AR, unique), expected, rtol=1e-5)


def test_all_resamples_are_minimised_as_each_alone():
    rng = np.random.default_rng(0)
    values = {k: v * np.exp(0.1 * rng.standard_normal(7)) for k, v in AR.values.items()}
    many = replace(AR, resamples=values)
    flops, unique = np.geomspace(1e16, 1e21, 4)[:, None], np.array([1e7, 1e8, 1e9])
    found = best_allocation(many, flops, unique, resampled=True)
    assert found.loss.shape == (7, 4, 3)
    for i in range(7):
        alone = replace(AR, values={k: float(v[i]) for k, v in values.items()})
        expected = best_allocation(alone, flops, unique)
        np.testing.assert_allclose(found.loss[i], expected.loss, rtol=1e-12)
        np.testing.assert_allclose(found.params[i], expected.params, rtol=1e-3)


def test_no_allocation_helps_beyond_saturation():
    unique = np.array([1e7, 1e9])
    flops = saturation(AR, unique)
    limit = AR.loss(1e60, 1e60, unique)
    at, further = (best_allocation(AR, c, unique).loss for c in (flops, 100 * flops))
    assert (at - limit < 1e-3).all()
    assert (at - further < 1e-3).all()
    before = best_allocation(AR, flops / 3, unique).loss
    assert (before - at > 1e-3 * np.log10(3)).all()


def test_a_law_without_repetition_never_saturates():
    assert np.isinf(saturation(CHINCHILLA, 1e6))


def test_a_law_that_rises_turns_at_its_lowest_loss():
    at = float(turn(QUOKKA, 1e7))
    losses = [minimise(QUOKKA.law, QUOKKA.values, at * c, 1e7)[1] for c in (0.8, 1, 1.25)]
    assert losses[1] < min(losses[0], losses[2])
    assert float(saturation(QUOKKA, 1e7)) < at
    assert turn(AR, 1e7) == np.inf


def test_the_first_fall_is_found_and_the_ends_are_told_apart():
    roots = first_root(lambda x, a: np.cos(x) - a, 0.0, 10.0, (np.array([0.5, -2.0, 2.0]),))
    assert roots[0] == pytest.approx(np.pi / 3)
    assert roots[1] == np.inf
    assert roots[2] == -np.inf


def test_contour_holds_the_law_and_its_frontier():
    grid = contour(AR, 1e8, np.geomspace(1e7, 1e9, 5), np.geomspace(1, 500, 6))
    assert grid.loss.shape == grid.flops.shape == grid.supported.shape == (6, 5)
    assert grid.loss[3, 2] == AR.loss(grid.params[2], grid.epochs[3] * 1e8, 1e8)
    assert grid.supported[-1, 0]
    assert not grid.supported[-1, -1]  # 3e20 FLOPs
    path = grid.path
    assert len(path.loss) > 10
    assert (np.diff(path.loss) < 0).all()
    assert path.params.min() >= 1e7 and path.epochs.max() <= 500


def test_support_names_what_is_outside():
    assert supported(AR, 1e8, 1e9, 1e8)
    assert not supported(replace(AR, support={}), 1e8, 1e9, 1e8)
    assert outside(AR, 1e8, 1e9, 1e8) == {}
    assert outside(AR, 1e6, 1e12, 1e8) == {
        "params": "below",
        "tokens": "above",
        "epochs": "above",
    }


def test_reach_wants_an_allocation_near_the_best_one():
    unique, flops = 5e7, np.array([1e15, 1e17, 1e19, 1e20, 1e23, np.inf])
    # The plateau is reached inside the data, so that more compute stays in reach.
    assert within_reach(AR, flops, unique).tolist() == [False, True, True, True, True, False]
    assert not within_reach(AR, 1e19, 1e10)
    assert not within_reach(replace(AR, support={}), 1e19, unique)
    small = replace(AR, support=AR.support | {"params": (7e6, 2.5e7)})
    assert within_reach(small, np.array([1e17, 1e19]), unique).tolist() == [True, False]
