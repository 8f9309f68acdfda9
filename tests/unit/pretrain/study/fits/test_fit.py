"""Fits of synthetic studies: the truth comes back, and settings are honoured."""

import numpy as np
import pandas as pd
import pytest

from pretrain.errors import ConfigError
from pretrain.study.fits.bootstrap import bootstrap, interval
from pretrain.study.fits.fit import fit_law, pose
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.problem import huber
from pretrain.study.fits.profile import profile
from pretrain.study.fits.published import published, published_law
from pretrain.study.fits.selection import compare_laws

TRUTH = published_law("prabhudesai_autoregressive")


def test_exact_losses_give_the_coefficients(synthetic):
    fitted = fit_law(synthetic(), "data_constrained", check=False)
    for name, value in TRUTH.values.items():
        assert fitted.values[name] == pytest.approx(value, rel=1e-3), name
    assert fitted.diagnostics["r2"] == pytest.approx(1, abs=1e-9)


def test_objective_is_a_sum_and_its_gradient_that_of_differences(synthetic):
    table = synthetic(0.01)
    problem = pose(table, "data_constrained", tied={"beta": "alpha"}, fixed={"E": 1.8})
    assert problem.free == ("A", "B", "alpha", "R_D", "R_N")
    problem = problem.replace(weights=np.linspace(0.5, 2, len(table)))
    theta = problem.theta({**TRUTH.values, "A": 250.0})
    value, slope, _ = problem.objective(theta)
    residual = problem.residuals(theta)
    by_hand = [
        w * (0.5 * r * r if abs(r) <= 1e-3 else 1e-3 * (abs(r) - 5e-4))
        for r, w in zip(residual, problem.weights, strict=True)
    ]
    assert value == pytest.approx(sum(by_hand))
    for i in range(len(theta)):
        step = np.zeros(len(theta))
        step[i] = 1e-6
        change = problem.objectives(theta + step) - problem.objectives(theta - step)
        assert slope[i] == pytest.approx(change / 2e-6, rel=1e-5, abs=1e-9)


def test_huber_is_quadratic_then_linear():
    residual = np.array([-2e-3, -5e-4, 0.0, 1e-3])
    np.testing.assert_allclose(huber(residual, 1e-3), [1.5e-6, 1.25e-7, 0, 5e-7])


def test_tied_and_fixed_coefficients_are_held(synthetic):
    table = synthetic(0.01)
    fitted = fit_law(
        table, "data_constrained", tied={"beta": "alpha"}, fixed={"R_N": 55.16}, check=False
    )
    assert fitted.values["beta"] == fitted.values["alpha"]
    assert fitted.values["R_N"] == 55.16
    drawn = bootstrap(fitted, table, resamples=5)
    assert drawn.resamples["beta"] == drawn.resamples["alpha"]
    assert set(drawn.resamples["R_N"]) == {55.16}
    free = fit_law(table, "data_constrained", check=False)
    assert free.diagnostics["objective"] < fitted.diagnostics["objective"]


def test_noisy_rows_weigh_less(synthetic):
    table = synthetic(0.002)
    noisy = np.arange(len(table)) % 3 == 0
    table.loc[noisy, "loss"] *= 1.08
    table["noise_error"] = np.where(noisy, 0.5, 0.0)
    held = {name: TRUTH.values[name] for name in ("alpha", "beta", "R_D", "R_N", "A", "B")}
    plain = fit_law(table, "data_constrained", fixed=held, delta=1.0)
    weighted = fit_law(table, "data_constrained", fixed=held, delta=1.0, errors="noise_error")
    truth = TRUTH.values["E"]
    assert abs(weighted.values["E"] - truth) < 0.3 * abs(plain.values["E"] - truth)


def test_a_fit_is_stored_and_read(synthetic):
    table = synthetic(0.01).assign(family="masked", arm="tuned", likelihood="bound")
    fitted = bootstrap(fit_law(table, "single_epoch", check=False), table, resamples=3)
    assert (fitted.family, fitted.arm, fitted.likelihood) == ("masked", "tuned", "bound")
    assert Fitted.from_dict(fitted.to_dict()) == fitted
    assert fitted.support["epochs"] == (1, 40)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({}, {"law": "chinchilla"}, "known are coupled"),
        ({}, {"fixed": {"R_D": 3.0}}, "no R_D"),
        ({"loss": np.nan}, {}, "positive and finite"),
        ({"arm": lambda t: ["a"] + ["b"] * (len(t) - 1)}, {}, "one fit is of one arm"),
    ],
)
def test_user_errors_say_what_to_change(synthetic, change, options, message):
    table = synthetic(0.01).assign(**change)
    with pytest.raises(ConfigError, match=message):
        fit_law(table, options.pop("law", "single_epoch"), check=False, **options)


def test_too_few_rows_are_refused(synthetic):
    with pytest.raises(ConfigError, match="5 rows cannot fix the 5 coefficients"):
        fit_law(synthetic().head(5), "single_epoch")


def test_clusters_are_drawn_whole(synthetic):
    table = synthetic(0.01)
    thrice = pd.concat([table.assign(configuration=table.index)] * 3, ignore_index=True)
    one = fit_law(table, "single_epoch", check=False)
    three = fit_law(thrice, "single_epoch", check=False)
    assert three.diagnostics["clusters"] == len(table)
    # Copies of the same points carry no further information.
    errors = [
        np.std(bootstrap(fitted, rows, resamples=40, seed=3).resamples["alpha"])
        for fitted, rows in ((one, table), (three, thrice))
    ]
    assert errors[1] == pytest.approx(errors[0], rel=0.05)
    assert three.diagnostics["aic"] == pytest.approx(one.diagnostics["aic"])


def test_intervals_hold_infinite_values():
    samples = np.append(np.arange(90.0), np.full(10, np.inf))
    low, high = interval(samples)
    assert low == 5
    assert high == np.inf


def test_a_profile_touches_the_fit_and_bounds_what_is_known(synthetic):
    table = synthetic(0.005)
    fitted = fit_law(table, "data_constrained", tied={"beta": "alpha"}, check=False)
    found = profile(fitted, table, "alpha", values=np.linspace(0.25, 0.4, 13))
    assert found.objectives.min() == pytest.approx(fitted.diagnostics["objective"], rel=1e-6)
    assert found.interval[0] < fitted.values["alpha"] < found.interval[1]
    assert found.interval[0] < TRUTH.values["alpha"] < found.interval[1]
    assert "objective" in str(found)
    with pytest.raises(ConfigError, match="the free coefficients are"):
        profile(fitted, table, "beta")


def test_laws_are_chosen_by_prediction(synthetic):
    found = compare_laws(
        synthetic(0.005),
        {"single_epoch": {}, "constrained": {"law": "data_constrained", "tied": {"beta": "alpha"}}},
        folds=3,
    )
    assert list(found["candidate"]) == ["constrained", "single_epoch"]
    assert list(found["coefficients"]) == [6, 5]
    for column in ("aic", "bic", "largest_error", "folds_error"):
        assert found[column][0] < found[column][1]


def test_published_laws_name_their_origin():
    laws = published()
    assert {name for name, law in laws.items() if law.source.startswith("reconstructed")} == {
        "prabhudesai_autoregressive",
        "prabhudesai_masked",
    }
    for law in laws.values():
        assert law.source.startswith(("published", "reconstructed"))
        assert "arXiv" in law.source
        assert set(law.values) == set(law.law.coefficients)
        assert {"params", "tokens", "epochs"} <= set(law.support)
        assert Fitted.from_dict(law.to_dict()) == law
    with pytest.raises(ConfigError, match="there are hoffmann"):
        published_law("softq")


def test_published_laws_predict_their_anchors():
    autoregressive, masked = TRUTH, published_law("prabhudesai_masked")
    single = [(3.95e6, autoregressive, 7.07), (0.68e6, masked, 10.65)]
    for size, law, loss in single:
        assert law.loss(size, 1e8, 1e8) == pytest.approx(loss, rel=0.01)
    assert autoregressive.loss(144.8e6, 50e8, 1e8) == pytest.approx(3.735, abs=0.01)
    assert masked.loss(416.9e6, 500e8, 1e8) == pytest.approx(3.41, abs=0.01)
