"""Outcomes, gaps and trends on curves made by hand."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from study_tables import curves, row

from pretrain.study.early_stopping import Gap, gaps, outcomes, reference_arm, trend


def test_best_last_and_turn() -> None:
    found = {(item.arm, item.unique_tokens): item for item in outcomes(curves())}
    ar, masked = found["ar", 1e5], found["mdm", 1e5]
    assert (ar.best.epochs, ar.best.loss, ar.final.epochs) == (8, 5.0, 100)
    assert ar.overfits and ar.finished
    assert masked.best.epochs == masked.final.epochs == 100
    assert not masked.overfits


@pytest.mark.parametrize(("rise", "overfits"), [(0.027, False), (0.030, True)])
def test_a_turn_exceeds_twice_the_error(rise: float, overfits: bool) -> None:
    """Two errors of 0.01 make one of 0.01414 for the difference, twice that is 0.0283."""
    rows = [row("a", "masked", 1e5, 1, 5.0), row("a", "masked", 1e5, 2, 5.0 + rise)]
    assert outcomes(pd.DataFrame(rows))[0].overfits is overfits


def test_unknown_noise_takes_the_larger_standard_error_and_none_is_no_turn() -> None:
    table = pd.DataFrame([row("a", "masked", 1e5, 1, 5.0), row("a", "masked", 1e5, 2, 5.1)])
    table["noise_error"] = np.nan
    assert outcomes(table)[0].best.error == 0.01
    table["standard_error"] = np.nan
    assert math.isinf(outcomes(table)[0].best.error)
    assert not outcomes(table)[0].overfits


def test_seeds_are_one_configuration_with_their_spread() -> None:
    best = next(i for i in outcomes(curves(seeds=(0, 1, 2))) if i.arm == "ar").best
    assert best.seeds == 3
    assert best.loss == pytest.approx(5.02)
    assert best.error == pytest.approx(0.02 / math.sqrt(3))


def test_gap_and_trend() -> None:
    found = outcomes(curves())
    assert reference_arm(found) == "ar"
    both = gaps(found, "ar")
    assert [gap.gap for gap in both] == pytest.approx([-0.1, -0.1])
    assert [gap.error for gap in both] == pytest.approx([0.01, 0.01])
    assert reference_arm([item for item in found if item.arm == "mdm"]) is None


def test_trend_agrees_with_weighted_least_squares() -> None:
    unique, values, errors = [1e5, 1e6, 1e7], [0.3, 0.2, 0.15], [0.01, 0.02, 0.01]
    line = trend([Gap("a", "r", *one) for one in zip(unique, values, errors, strict=True)])
    x = np.log10(unique)
    (slope, _), covariance = np.polyfit(x, values, 1, w=1 / np.array(errors), cov="unscaled")
    misfit = np.sum(((values - np.polyval(np.polyfit(x, values, 1, w=1 / np.array(errors)), x))
                     / errors) ** 2)  # fmt: skip
    assert line is not None
    assert line.slope == pytest.approx(slope)
    assert line.error == pytest.approx(math.sqrt(covariance[0, 0] * max(1.0, misfit)))
    assert trend([Gap("a", "r", 1e5, 0.1, 0.01)]) is None
