"""Published coefficients, recovered from published measurements."""

import math

import numpy as np
import pandas as pd
import pytest

from pretrain.study.fits.bootstrap import bootstrap
from pretrain.study.fits.fit import fit_law, pose
from pretrain.study.fits.isoflop import parabolas
from pretrain.study.fits.laws import best_epochs
from pretrain.study.fits.profile import profile
from pretrain.study.fits.published import published_law

FIRST_STAGE = {
    "A": math.exp(6.255414),
    "B": math.exp(7.3049974),
    "E": math.exp(0.6254804),
    "alpha": 0.3526596,
    "beta": 0.3526596,
}


@pytest.fixture(scope="module")
def without_largest(chinchilla):
    """The 240 points below the five largest losses."""
    return chinchilla[chinchilla["loss"] < chinchilla["loss"].nlargest(5).min()]


@pytest.fixture(scope="module")
def repeated(measured):
    """The 182 runs of the data-constrained fit."""
    return measured("datablations_fit182.csv")


def assert_close(values, expected):
    """Agreement within the tolerances of exponents, entropy and factors."""
    bounds = {"A": 0.01, "B": 0.03}
    for name, value in expected.items():
        if name in bounds:
            assert values[name] == pytest.approx(value, rel=bounds[name]), name
        else:
            assert values[name] == pytest.approx(value, abs=1e-3 if name == "E" else 5e-4), name


def test_huber_fit_of_chinchilla(without_largest):
    assert len(without_largest) == 240
    fitted = fit_law(without_largest, "single_epoch", digitised=True)
    expected = {"A": 477.84, "B": 2143.9, "E": 1.81724, "alpha": 0.34731, "beta": 0.36718}
    assert_close(fitted.values, expected)
    assert fitted.diagnostics["objective"] == pytest.approx(1.01827e-3, abs=1e-8)
    assert fitted.diagnostics["gradient"] < 1e-6
    assert any("read from a figure" in warning for warning in fitted.warnings)


@pytest.mark.parametrize("delta", [5e-6, None])
def test_absolute_deviations_give_the_replications_coefficients(without_largest, delta):
    fitted = fit_law(without_largest, "single_epoch", delta=delta)
    expected = {"A": 482.01, "B": 2085.43, "E": 1.8168, "alpha": 0.3478, "beta": 0.3658}
    assert_close(fitted.values, expected)


def test_five_outliers_move_the_exponent_by_a_quarter(chinchilla):
    fitted = fit_law(chinchilla, "single_epoch")
    assert_close(fitted.values, {"B": 12846, "beta": 0.453, "E": 1.891})
    assert any("5 of 245 configurations move beta" in warning for warning in fitted.warnings)


def test_second_stage_at_the_published_point(repeated):
    problem = pose(repeated, "data_constrained", fixed=FIRST_STAGE)
    published = np.log([15.387756, 5.309743])
    assert problem.objective(published)[0] == pytest.approx(0.0158259, abs=1e-7)
    held = {**FIRST_STAGE, "R_D": 15.387756, "R_N": 5.309743}
    assert fit_law(repeated, "data_constrained", fixed=held).diagnostics["r2"] == pytest.approx(
        0.7722, abs=1e-4
    )


def test_a_local_search_finds_the_published_optimum_and_says_that_a_better_exists(repeated):
    fitted = fit_law(
        repeated, "data_constrained", fixed=FIRST_STAGE, starts=[{"R_D": 13.3, "R_N": 6.7}]
    )
    assert fitted.values["R_D"] == pytest.approx(15.37, abs=0.01)
    assert fitted.values["R_N"] == pytest.approx(5.315, abs=0.002)
    assert "a better optimum exists: objective 0.0158047" in fitted.warnings[0]


def test_the_grid_of_starts_finds_the_better_optimum(repeated):
    fitted = fit_law(repeated, "data_constrained", fixed=FIRST_STAGE)
    assert fitted.diagnostics["objective"] <= 0.0158047
    assert fitted.values["R_D"] == pytest.approx(95.4, abs=0.1)
    assert not any("better optimum" in warning for warning in fitted.warnings)
    assert any("flat optimum" in warning and "R_D" in warning for warning in fitted.warnings)


def test_without_decay_and_with_that_of_data_alone(repeated):
    plain = fit_law(repeated, "single_epoch", fixed=FIRST_STAGE)
    assert plain.diagnostics["r2"] == pytest.approx(0.44517, abs=1e-5)
    # An infinite R_N leaves N' = N.
    data_only = fit_law(repeated, "data_constrained", fixed={**FIRST_STAGE, "R_N": 1e9})
    assert data_only.values["R_D"] == pytest.approx(2.9157, abs=2e-3)
    assert data_only.diagnostics["objective"] == pytest.approx(0.0169224, abs=1e-7)


def test_r_d_is_bounded_on_one_side_only(repeated):
    fitted = fit_law(repeated, "data_constrained", fixed=FIRST_STAGE)
    values = np.array([10, 15.4, 30, 300, 1000, 1e4])
    found = profile(fitted, repeated, "R_D", values=values)
    at = dict(zip(found.values, found.objectives, strict=True))
    expected = {10: 0.01591, 15.4: 0.015826, 30: 0.015821, 300: 0.015837, 1000: 0.015878}
    for value, objective in expected.items():
        assert at[value] == pytest.approx(objective, abs=1e-6)
    assert found.interval[1] == math.inf
    drawn = bootstrap(fitted, repeated, resamples=100).resamples["R_D"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    assert 3 < low < 10
    assert high > 1e4


def test_few_epochs_with_equal_exponents(measured):
    table = measured("datablations_all296.csv")
    table = table[table["tokens"] / table["unique_tokens"] <= 2.5]
    assert len(table) == 62
    fitted = fit_law(table, "single_epoch", tied={"beta": "alpha"})
    assert 634 <= fitted.values["A"] <= 635.5
    assert 3050 <= fitted.values["B"] <= 3054.5
    assert fitted.values["E"] == pytest.approx(1.8965, abs=3e-4)
    assert fitted.values["alpha"] == pytest.approx(0.3596, abs=1e-4)
    assert fitted.values["beta"] == fitted.values["alpha"]
    assert fitted.diagnostics["objective"] == pytest.approx(0.00122, abs=2e-6)


def test_isoflop_parabolas_of_quokka(measured):
    found = parabolas(measured("quokka_isoflop_points.csv"))
    assert found.params.exponent == pytest.approx(0.5138, abs=1e-4)
    assert found.params.coefficient == pytest.approx(0.02167, abs=2e-5)
    assert found.tokens.exponent == pytest.approx(0.4862, abs=1e-4)
    assert found.tokens.coefficient == pytest.approx(7.692, abs=2e-3)
    narrow = found.windows[found.windows["window"] == 0.25].iloc[0]
    assert narrow["exponent"] == pytest.approx(0.4985, abs=1e-4)
    assert narrow["coefficient"] == pytest.approx(0.0438, abs=1e-4)
    assert any("moves by" in warning for warning in found.warnings)


def test_u_shapes_are_beyond_a_monotone_law(measured):
    table = measured("quokka_fig4_val_loss.csv")
    listed = [(145, 171), (145, 151), (217, 131), (217, 157), (166, 404), (417, 465)]
    for (_, budget), (size, epochs) in zip(table.groupby("unique_tokens"), listed, strict=True):
        lowest = budget.loc[budget["loss"].idxmin()]
        assert lowest["params_millions"] == size
        curve = budget[budget["params_millions"] == size]
        nearest = curve.loc[(curve["epochs"] - epochs).abs().idxmin()]
        # Epochs are given at steps of 17 %, losses to 0.005.
        assert nearest["loss"] - lowest["loss"] <= 0.0051
    monotone = fit_law(table, "data_constrained", check=False)
    interior = fit_law(table, "interior_optimum", check=False)
    assert monotone.diagnostics["trend"] > 0.3
    assert any("does not have the form" in warning for warning in monotone.warnings)
    assert any("overfitted" in warning for warning in monotone.warnings)
    assert interior.diagnostics["trend"] < 0.05
    assert not any("does not have the form" in warning for warning in interior.warnings)
    assert interior.diagnostics["objective"] < 0.6 * monotone.diagnostics["objective"]
    assert interior.diagnostics["aic"] < monotone.diagnostics["aic"] - 20


def test_epochs_before_degradation_of_quokka(measured):
    printed = published_law("quokka_interior_optimum").values
    table = measured("quokka_tables.csv")
    table = table[table["table"] == 3]
    many = table[table["epochs"] >= 25]
    few = table[table["epochs"] < 25]

    def ours(values, rows):
        pairs = zip(rows["params"], rows["unique_tokens"], strict=True)
        return np.array([best_epochs(values, *pair) for pair in pairs])

    assert np.abs(ours(printed, many) / many["epochs"] - 1).max() < 0.10
    # Two printed digits of an exponent are some epochs where there are few.
    assert np.abs(ours(printed, few) - few["epochs"]).max() < 3
    # Exponents inside their printed rounding give the table.
    inside = {**printed, "p": 1.49136, "gamma": 0.40283, "m": 0.38969, "k": 0.54520}
    for name in ("p", "gamma", "m", "k"):
        assert abs(inside[name] - printed[name]) <= 0.005
    assert np.abs(ours(inside, many) / many["epochs"] - 1).max() < 0.025


def test_bootstrap_errors_of_chinchilla(without_largest):
    fitted = fit_law(without_largest, "single_epoch")
    drawn = pd.DataFrame(bootstrap(fitted, without_largest, resamples=400).resamples)
    expected = {"A": 118, "B": 1480, "E": 0.0246, "alpha": 0.0146, "beta": 0.0194}
    for name, error in expected.items():
        # The error of a standard deviation of 400 draws is 4 %, of skewed ones more.
        assert drawn[name].std() == pytest.approx(error, rel=0.3), name
    share = drawn["beta"] / (drawn["alpha"] + drawn["beta"])
    assert share.mean() == pytest.approx(0.516, abs=0.006)
    assert share.std() == pytest.approx(0.018, abs=0.003)
    assert np.corrcoef(np.log(drawn["A"]), drawn["alpha"])[0, 1] > 0.99
