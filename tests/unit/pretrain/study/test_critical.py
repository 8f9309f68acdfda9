"""Critical compute: numeric crossing, closed form, bands, and what was published."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pretrain.config.groups import CONFIG_ROOT
from pretrain.study.closed_form import closed_form, closed_form_errors, plateau
from pretrain.study.critical import (
    bound_bias,
    compare,
    critical_line,
    crossing,
    fit_line,
    published_critical,
)
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.laws import LAWS, DataConstrained
from pretrain.study.fits.published import published_law

DATA = Path(__file__).resolve().parents[5] / "shared" / "data" / "scaling"
needs_data = pytest.mark.skipif(not DATA.exists(), reason=f"published measurements: no {DATA}")
AR, MASKED = (published_law(f"prabhudesai_{family}") for family in ("autoregressive", "masked"))
BUDGETS = np.geomspace(1e7, 1e9, 20)


def rows(name):
    lines = (DATA / name).read_text().splitlines()
    return list(csv.DictReader(line for line in lines if not line.startswith("#")))


def brute_force(challenger, reference, unique, flops):
    """First compute of `flops` at which the challenger is not worse, each on a grid of sizes."""
    params = np.geomspace(1e4, 1e14, 3001)[:, None]
    ours, theirs = (
        fitted.loss(params, flops / 6 / params, unique).min(axis=0)
        for fitted in (challenger, reference)
    )
    return flops[np.argmax(ours <= theirs)]


def spread(fitted, count, size=0.01, seed=0):
    rng = np.random.default_rng(seed)
    values = {k: v * np.exp(size * rng.standard_normal(count)) for k, v in fitted.values.items()}
    return replace(fitted, resamples={k: v.tolist() for k, v in values.items()})


@pytest.mark.parametrize("unique", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("include_entropy", [True, False])
def test_crossing_is_that_of_brute_force(unique, include_entropy):
    found = float(crossing(MASKED, AR, unique, include_entropy=include_entropy))
    flops = np.geomspace(found / 3, found * 3, 1201)
    fits = [
        f if include_entropy else replace(f, values=f.values | {"E": 0.0}) for f in (MASKED, AR)
    ]
    assert found == pytest.approx(brute_force(*fits, unique, flops), rel=3e-3)


class Plateau(DataConstrained):
    """Loss of a data-constrained law with unlimited compute."""

    name = "plateau"

    def loss(self, values, params, tokens, unique):
        shape = np.broadcast_shapes(np.shape(params), np.shape(tokens), np.shape(unique))
        return super().loss(values, np.full(shape, 1e60), np.full(shape, 1e60), unique)


@pytest.mark.parametrize("include_entropy", [True, False])
@pytest.mark.parametrize("beta", [0.31, 0.36])
def test_closed_form_is_the_crossing_of_its_asymptotic_laws(monkeypatch, include_entropy, beta):
    monkeypatch.setitem(LAWS, "plateau", Plateau())
    plateaued = replace(AR, law_name="plateau", values=AR.values | {"beta": beta})
    fresh = replace(MASKED, law_name="single_epoch")
    fresh = replace(fresh, values={k: MASKED.values[k] for k in ("A", "B", "E", "alpha", "beta")})
    options = {"include_entropy": include_entropy}
    numeric = crossing(fresh, plateaued, BUDGETS, flops_range=(1e10, 1e40), **options)
    reference = replace(AR, values=plateaued.values)
    closed = closed_form(MASKED, reference, BUDGETS, **options)
    np.testing.assert_allclose(closed, numeric, rtol=1e-5)


def test_closed_form_has_the_numbers_of_the_derivation():
    assert plateau(AR.values) == pytest.approx(497.4, abs=0.05)
    assert closed_form(MASKED, AR, [1e7, 1e8]) == pytest.approx([2.9e17, 4.5e19], rel=0.02)
    dropped = closed_form(MASKED, AR, [1e7, 1e8], include_entropy=False)
    assert dropped == pytest.approx([2.2e17, 2.5e19], rel=0.02)
    line = fit_line(BUDGETS, closed_form(MASKED, AR, BUDGETS, include_entropy=False))
    assert line.slope == pytest.approx(2 * 0.31 / 0.3017, abs=1e-6)


def test_closed_form_refuses_laws_without_a_plateau():
    with pytest.raises(ValueError, match="numeric crossing"):
        closed_form(MASKED, published_law("besiroglu"), 1e8)


def test_the_table_of_errors_of_the_closed_form():
    """The closed form is early, the more so for large U; it knows no budget without a crossing."""
    lines = []
    for row in closed_form_errors(MASKED, AR, [1e7, 1e8, 1e9, 1e10]).itertuples():
        numeric = "none" if np.isinf(row.numeric) else f"{row.numeric:.2e}"
        kept = "kept" if row.include_entropy else "dropped"
        ratio = "" if np.isinf(row.numeric) else f"{row.ratio:.2f}"
        budget = f"{row.unique_tokens:.0e} | {kept}"
        lines.append(f"| {budget} | {numeric} | {row.closed_form:.2e} | {ratio} |")
    page = CONFIG_ROOT.parent / "docs" / "studies.md"
    if not page.exists():
        pytest.skip("installed without the documents")
    assert "\n".join(lines) in page.read_text(), "\n".join(lines)
    errors = closed_form_errors(MASKED, AR, BUDGETS)
    assert (errors["ratio"] < 1).all()
    assert len(errors) == 40


def test_the_exponent_is_set_by_the_entropy_terms():
    lines = [critical_line(MASKED, AR, BUDGETS, include_entropy=e).line for e in (True, False)]
    assert [line.slope for line in lines] == pytest.approx([2.40, 2.09], abs=0.01)
    assert [10**line.intercept for line in lines] == pytest.approx([1.36e15, 2.11e15], rel=0.01)
    assert [line.points for line in lines] == [20, 20]


@needs_data
def test_reconstructed_laws_predict_the_published_measurements():
    expected = {"ar": (AR, 0.021), "mdm": (MASKED, 0.016)}
    for family, (fitted, rms) in expected.items():
        points = [row for row in rows("prabhudesai_fig3_data_value.csv") if row["family"] == family]
        n, d, u, loss = (
            np.array([float(row[name]) for row in points])
            for name in ("params", "tokens", "unique_tokens", "val_loss")
        )
        assert len(points) == 15
        errors = fitted.loss(n, d, u) - loss
        assert np.sqrt(np.mean(errors**2)) == pytest.approx(rms, abs=1e-3)


@needs_data
def test_lines_through_the_published_crossings():
    points = rows("prabhudesai_fig6_critical_compute.csv")
    lines = {}
    for kind in ("law", "star"):
        chosen = [
            (float(row["unique_tokens"]), float(row["critical_flops"]))
            for row in points
            if row["kind"] == kind
        ]
        lines[kind] = fit_line(*np.array(chosen).T)
    assert lines["law"].slope == pytest.approx(2.39, abs=0.02)
    assert 10 ** lines["law"].intercept == pytest.approx(8.4e14, rel=0.05)
    assert lines["star"].slope == pytest.approx(1.39, abs=0.01)


def test_the_printed_law():
    budgets = [1e7, 2.5e7, 5e7, 1e8, 5e8, 1e9]
    expected = [3.2e17, 2.3e18, 1.05e19, 4.7e19, 1.6e21, 7.1e21]
    assert published_critical(budgets) == pytest.approx(expected, rel=0.03)


def test_no_crossing_is_infinite_and_a_better_challenger_crosses_at_once():
    worse = replace(MASKED, values=MASKED.values | {"E": 5.0})
    better = replace(MASKED, values=AR.values | {"E": 1.0})
    assert np.isinf(crossing(worse, AR, BUDGETS)).all()
    assert (crossing(better, AR, BUDGETS) == 0).all()
    line = critical_line(worse, AR, BUDGETS)
    assert np.isnan(line.line.slope)
    assert not line.supported.any()
    assert line.band is None and line.slope_interval is None


def test_a_crossing_outside_the_searched_range_is_none():
    found = float(crossing(MASKED, AR, 1e8))
    assert crossing(MASKED, AR, 1e8, flops_range=(1e15, found / 2)) == np.inf
    assert crossing(MASKED, AR, 1e8, flops_range=(found * 2, 1e24)) == 0
    inside = crossing(MASKED, AR, 1e8, flops_range=(found / 2, found * 2))
    assert inside == pytest.approx(found, rel=1e-6)


def test_resamples_cross_as_each_pair_alone():
    ours, theirs = spread(MASKED, 6), spread(AR, 9, seed=1)
    budgets = np.array([1e7, 1e9])
    found = crossing(ours, theirs, budgets, resampled=True)
    assert found.shape == (6, 2)
    for i in range(6):
        alone = [
            replace(f, values={k: v[i] for k, v in f.resamples.items()}, resamples={})
            for f in (ours, theirs)
        ]
        np.testing.assert_allclose(found[i], crossing(*alone, budgets), rtol=1e-6)
    np.testing.assert_allclose(
        closed_form(ours, theirs, budgets, resampled=True)[2],
        closed_form(
            *(replace(f, values={k: v[2] for k, v in f.resamples.items()}) for f in (ours, theirs)),
            budgets,
        ),
    )


def test_one_side_without_resamples_keeps_its_coefficients():
    ours = spread(MASKED, 5)
    found = crossing(ours, AR, 1e8, resampled=True)
    fixed = {k: [v] * 5 for k, v in AR.values.items()}
    expected = crossing(ours, replace(AR, resamples=fixed), 1e8, resampled=True)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_resamples_without_a_crossing_open_the_band():
    entropies = np.where(np.arange(20) < 4, 5.0, MASKED.values["E"])
    values = {k: [v] * 20 for k, v in MASKED.values.items()} | {"E": entropies.tolist()}
    line = critical_line(replace(MASKED, resamples=values), AR, [1e7, 1e8])
    low, high = line.band
    np.testing.assert_allclose(low, line.flops)
    assert np.isinf(high).all()
    assert line.share_without_crossing.tolist() == [0.2, 0.2]
    slope = line.line.slope
    assert line.slope_interval == pytest.approx((slope, slope))


def test_the_band_covers_the_crossing_and_widens_with_the_spread():
    narrow, wide = (
        critical_line(spread(MASKED, 40, size), spread(AR, 40, size, seed=1), [1e7, 1e8])
        for size in (0.002, 0.01)
    )
    for line in (narrow, wide):
        low, high = line.band
        assert ((low < line.flops) & (line.flops < high)).all()
    ratio = [np.log(line.band[1] / line.band[0]) for line in (narrow, wide)]
    assert (ratio[1] > 2 * ratio[0]).all()


def test_support_ends_where_the_data_do():
    line = critical_line(MASKED, AR, [1e7, 3e7, 9e7, 2e8])
    assert line.supported.tolist() == [False, True, True, False]
    without = replace(AR, support={})
    assert not critical_line(MASKED, without, [3e7]).supported.any()


def test_a_reference_that_rises_keeps_its_best_loss():
    """Runs stop where they are best, so that overfitting alone gives nobody a crossing."""
    rising = replace(published_law("quokka_interior_optimum"), family="autoregressive")
    floor = 0.05 + float(
        rising.loss(
            *np.meshgrid(np.geomspace(1e6, 1e9, 400), np.geomspace(1e8, 1e11, 400)), 1e7
        ).min()
    )
    flat = Fitted(
        "single_epoch",
        {"A": 1e-9, "B": 1e-9, "E": floor, "alpha": 0.3, "beta": 0.3},
        "masked",
    )
    assert crossing(flat, rising, 1e7, flops_range=(1e18, 1e26)) == np.inf


def test_both_likelihoods_are_compared_and_the_bound_is_late():
    exact = replace(MASKED, likelihood="exact", values=MASKED.values | {"E": 1.90})
    comparisons = compare([AR, MASKED, exact], [1e7, 1e8])
    assert len(comparisons) == 1
    both = comparisons[0]
    assert both.exact.challenger is exact and both.bound.challenger is MASKED
    assert (both.lateness > 1).all()
    assert "earlier" in both.bound.bias
    assert both.exact.bias == ""
    assert [line.challenger.likelihood for line in both.lines] == ["exact", "bound"]
    assert compare([AR, MASKED], [1e7])[0].lateness is None


def test_every_arm_meets_every_arm_of_the_reference():
    fits = [replace(f, arm=arm) for f in (AR, MASKED) for arm in ("default", "tuned")]
    pairs = {(c.bound.challenger.arm, c.bound.reference.arm) for c in compare(fits, [1e8])}
    assert pairs == {(a, b) for a in ("default", "tuned") for b in ("default", "tuned")}


def test_what_bounds_do_to_a_crossing():
    bound = replace(AR, likelihood="bound")
    exact = replace(MASKED, likelihood="exact")
    assert "later" in bound_bias(exact, bound)
    assert "unknown" in bound_bias(MASKED, bound)
    assert bound_bias(exact, AR) == ""
