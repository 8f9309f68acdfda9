"""Parts of the report: choice of laws, optimal sizes, crossings of both likelihoods, settings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from study_tables import curves, row

from pretrain.study.early_stopping import outcomes
from pretrain.study.fits.laws import LAWS
from pretrain.study.fits.published import published_law
from pretrain.study.report.crossing import crossing_chart, crossing_tables
from pretrain.study.report.laws import fit_arms
from pretrain.study.report.observed import observed_crossings
from pretrain.study.report.optima import optima_table
from pretrain.study.report.selection import Selection, select_law, selection_table
from pretrain.study.tuned import best_settings

AR, MASKED = (
    replace(published_law(f"prabhudesai_{name}"), arm=name) for name in ("autoregressive", "masked")
)


def test_one_size_is_not_compared_and_the_report_says_so() -> None:
    laws = fit_arms(curves(), 0)
    assert not laws.fits
    assert [item.chosen for item in laws.selections] == [None, None]
    assert "one model size only" in laws.missing[0]
    few = select_law("ar", curves(), {"data_constrained": AR})
    assert few.chosen == "data_constrained"
    assert "laws are not compared" in selection_table([few])


def test_of_errors_that_are_alike_the_lower_criterion_decides(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compared(errors: dict[str, tuple[float, float]]) -> str | None:
        found = pd.DataFrame(
            [{"candidate": n, "folds_error": e, "bic": b} for n, (e, b) in errors.items()]
        )
        module = "pretrain.study.report.selection"
        monkeypatch.setattr(f"{module}.compare_laws", lambda *_: found)
        monkeypatch.setattr(f"{module}._require", lambda _: None)
        return select_law("a", curves(), {"data_constrained": AR}).chosen

    single = {"single_epoch": (0.0, -99.0)}  # never chosen: it knows no repeats
    alike = {"data_constrained": (0.0102, -3.0), "interior_optimum": (0.01, 0.0)}
    assert compared(single | alike) == "data_constrained"
    apart = {"data_constrained": (0.02, -3.0), "interior_optimum": (0.01, 0.0)}
    assert compared(single | apart) == "interior_optimum"


def test_repeats_that_count_as_fresh_and_predict_better_are_named() -> None:
    found = pd.DataFrame(
        {"candidate": ["single_epoch", "data_constrained"], "folds_error": [0.01, 0.02]}
    )
    assert Selection("ar", found, "data_constrained").beaten_by_baseline
    assert not Selection("ar", found.assign(folds_error=[0.03, 0.02]),
                         "data_constrained").beaten_by_baseline  # fmt: skip


def fresh_curves() -> pd.DataFrame:
    """Curves of fresh tokens by a law whose optimal size has the exponent .5."""
    values = {"A": 400.0, "B": 400.0, "E": 1.7, "alpha": 0.3, "beta": 0.3}
    rows = []
    for params in np.geomspace(1e7, 1.6e9, 13):
        for flops in np.geomspace(1e16, 1e18, 21):
            tokens = flops / 6 / params
            loss = float(LAWS["single_epoch"].loss(values, params, tokens, tokens))
            rows.append(
                row("ar", "autoregressive", tokens, 1.0, loss, params=params, final=True,
                    run=f"{params:g}", flops_6nd=flops, planned_epochs=1.0)
            )  # fmt: skip
    return pd.DataFrame(rows)


def test_both_approaches_find_the_exponent_of_the_optimal_size() -> None:
    text = optima_table(fresh_curves())
    assert "1, envelope of curves" in text
    assert "2, isoFLOP parabolas" in text
    exponents = [
        float(part[:5]) for part in text.split("N = ")[1:] for part in [part.split("C^(")[1]]
    ]
    assert exponents == pytest.approx([0.5, 0.5], abs=0.03)


def test_a_study_of_one_size_has_no_optimal_size() -> None:
    assert "1 model sizes" in optima_table(curves())


def test_both_likelihoods_of_an_arm_stand_side_by_side() -> None:
    values = {**MASKED.values, "E": MASKED.values["E"] - 0.05}
    exact = replace(MASKED, likelihood="exact", values=values)
    text = crossing_tables([AR, MASKED, exact], [1e7, 1e8])
    assert text.count("one likelihood only") == 0
    assert "bound over exact" in text
    assert "the crossing of the likelihoods comes earlier" in text
    assert "one likelihood only" in crossing_tables([AR, MASKED], [1e7])
    drawn = crossing_chart([AR, MASKED, exact], [1e7, 1e8], ("masked", "autoregressive"))
    labels = [item.label for item in drawn.panels[0].series]
    assert {"crossing of the laws, exact", "crossing of the laws, bound"} <= set(labels)


def test_observed_crossings_keep_the_best_loss_and_count_errors() -> None:
    found = observed_crossings(curves(budgets=(1e5,)), "mdm", "ar")
    # AR has 5.0 at epoch 8; masked 5.1 at 32 and 4.9 at 100.
    assert [(f.unique_tokens, f.flops, f.low) for f in found] == [(1e5, 6e13, 1.92e13)]
    noisy = curves(budgets=(1e5,)).assign(noise_error=0.1)
    assert observed_crossings(noisy, "mdm", "ar") == []
    assert observed_crossings(curves(), "mdm", "none") == []


def test_results_of_a_tuned_arm_are_those_of_its_best_setting() -> None:
    good = curves(budgets=(1e5,)).query("arm == 'ar'")
    worse = good.assign(loss=good["loss"] + 1, run=good["run"] + "b",
                        configuration=good["configuration"] + "b")  # fmt: skip
    worse.loc[worse["final"], "loss"] = 5.05  # a setting that overfits less, with a worse best
    both = pd.concat([good.assign(wd=0.1), worse.assign(wd=1.0)], ignore_index=True)
    (found,) = outcomes(both)
    assert (found.best.loss, found.final.loss, found.best.setting) == (5.0, 5.8, "wd=0.1")
    kept, note = best_settings(both)
    assert set(kept["wd"]) == {1.0}  # laws are of ends of schedules
    assert "1 of 2 runs were left out" in note
    assert best_settings(good)[1] == ""
