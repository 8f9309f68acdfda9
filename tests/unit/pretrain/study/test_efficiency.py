"""Fresh tokens that a run is worth, against published figures and hand-made baselines."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from pretrain.study.efficiency import (
    CURVE_COLUMNS,
    SLOWRUN,
    Baseline,
    effective_tokens,
    one_epoch_baseline,
    worth,
)

LINE = Baseline((1e6, 1e7, 1e8), (5.0, 4.0, 3.0))


def test_the_published_baseline_gives_the_published_efficiencies():
    """12.9 times at 3.001 nats, 10 times at the loss of 1B tokens."""
    assert worth(3.001, SLOWRUN).tokens / 1e8 == pytest.approx(12.9, abs=0.05)
    assert worth(3.046, SLOWRUN).tokens == pytest.approx(1e9)


@pytest.mark.parametrize("scale", ["log", "linear"])
def test_interpolation_is_that_of_numpy(scale):
    baseline = replace(SLOWRUN, scale=scale)
    axis = np.log(SLOWRUN.tokens) if scale == "log" else np.array(SLOWRUN.tokens)
    for loss in np.linspace(2.892, 3.703, 50):
        expected = np.interp(-loss, -np.array(SLOWRUN.losses), axis)
        expected = math.exp(expected) if scale == "log" else expected
        assert worth(loss, baseline, draws=1).tokens == pytest.approx(expected)


def test_nothing_is_extrapolated():
    below, above = worth(2.9, LINE), worth(5.1, LINE)
    assert (below.relation, below.tokens, below.high) == ("more than", 1e8, math.inf)
    assert (above.relation, above.tokens, above.low) == ("less than", 1e6, 0.0)
    assert (below.low, above.high) == (1e8, 1e6)
    assert str(below) == "more than 1e+08 fresh tokens (1e+08 to above the baseline)"
    assert str(above) == "less than 1e+06 fresh tokens (below the baseline to 1e+06)"
    assert worth(3.0, LINE).relation == worth(5.0, LINE).relation == "equal"


def test_without_errors_the_interval_is_the_value():
    found = worth(3.5, LINE)
    assert found.low == found.high == pytest.approx(found.tokens)
    assert found.tokens == pytest.approx(10**7.5)


def test_the_interval_has_the_errors_of_both():
    """On a line of slope 1 nat a decade, an error of e nats is e decades."""
    error = math.hypot(0.05, 0.03 * math.hypot(0.5, 0.5))
    found = worth(3.5, replace(LINE, errors=(0.03,) * 3), error=0.05, draws=20_000)
    width = math.log10(found.high / found.low) / 2 / 1.645
    assert width == pytest.approx(error, rel=0.05)
    alone = worth(3.5, LINE, error=0.05, draws=20_000)
    assert math.log10(alone.high / alone.low) / 2 / 1.645 == pytest.approx(0.05, rel=0.05)


def test_intervals_are_open_at_the_ends_of_the_baseline():
    assert worth(3.01, LINE, error=0.05).high == math.inf
    assert worth(4.99, LINE, error=0.05).low == 0.0


def test_a_baseline_that_rises_is_pooled_and_its_flat_part_is_worth_its_begin():
    bumpy = Baseline((1e6, 1e7, 1e8, 1e9), (5.0, 3.9, 4.1, 3.0))
    assert worth(4.0, bumpy).tokens == pytest.approx(1e7)
    assert worth(3.5, bumpy).tokens == pytest.approx(10**8.5)
    assert worth(4.5, bumpy).tokens == pytest.approx(10**6.5)


@pytest.mark.parametrize(
    "given",
    [((), ()), ((1e6, 1e7), (3.0,)), ((1e7, 1e6), (3.0, 4.0)), ((1e6,), (3.0,), (0.1, 0.1))],
)
def test_malformed_baselines_are_refused(given):
    with pytest.raises(ValueError, match="baseline"):
        Baseline(*given)


def row(arm, params, unique, epochs, loss, seed=0, planned=None, noise=0.0):
    planned = epochs if planned is None else planned
    return {
        "arm": arm,
        "configuration": f"{arm}-{params}-{unique}-{planned}",
        "seed": seed,
        "params": params,
        "unique_tokens": unique,
        "tokens": unique * epochs,
        "epochs": epochs,
        "planned_epochs": planned,
        "final": epochs == planned,
        "loss": loss,
        "noise_error": noise,
        "standard_error": 0.1,
    }


TABLE = pd.DataFrame(
    [
        row("plain", 1e6, 1e6, 1, 5.0),
        row("plain", 1e6, 1e7, 1, 4.02, seed=0),
        row("plain", 1e6, 1e7, 1, 3.98, seed=1),
        row("plain", 9e6, 1e7, 1, 4.5),
        row("plain", 1e6, 1e8, 1, 3.0),
        row("plain", 1e6, 1e6, 4, 4.8, planned=10),
        row("plain", 1e6, 1e6, 10, 4.5),
        row("plain", 1e6, 1e6, 100, 2.0),
        row("plain", 1e6, 1e6, 0.5, 6.0, planned=1),
        row("masked", 1e6, 1e6, 50, 4.0, noise=0.01),
    ]
)


def test_the_baseline_of_a_study_has_the_best_size_and_the_error_of_its_seeds():
    baseline = one_epoch_baseline(TABLE, "plain")
    assert baseline.tokens == (1e6, 1e7, 1e8)
    assert baseline.losses == pytest.approx((5.0, 4.0, 3.0))
    assert baseline.errors == pytest.approx((0.0, 0.02, 0.0))
    assert one_epoch_baseline(TABLE, "masked") is None


def test_curves_over_epochs():
    curves = effective_tokens(TABLE)
    assert list(curves.columns) == CURVE_COLUMNS
    assert set(curves["arm"]) == {"plain"}
    repeated = curves[curves["epochs"] > 1]
    assert repeated["epochs"].tolist() == [10, 100]
    assert repeated["effective_tokens"].tolist() == pytest.approx([10**6.5, 1e8])
    assert repeated["relation"].tolist() == ["equal", "more than"]
    assert repeated["efficiency"].tolist() == pytest.approx([10**0.5, 100])
    once = curves[curves["epochs"] == 1].query("params == 1e6")
    np.testing.assert_allclose(once["efficiency"], 1)
    assert len(effective_tokens(TABLE, final_only=False)) == len(curves) + 2


def test_an_arm_may_be_measured_by_the_baseline_of_another():
    given = {"masked": one_epoch_baseline(TABLE, "plain")}
    curves = effective_tokens(TABLE[TABLE["arm"] == "masked"], baselines=given)
    assert curves["effective_tokens"].tolist() == pytest.approx([1e7])
    assert curves["error"].tolist() == [0.01]
    assert effective_tokens(TABLE[TABLE["arm"] == "masked"]).empty
