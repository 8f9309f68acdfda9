"""Rows that a fit takes from a study's table, and the traps that it warns of."""

import numpy as np
import pandas as pd
import pytest

from pretrain.errors import ConfigError
from pretrain.study.fits.cautions import rising
from pretrain.study.fits.fit import fit_law
from pretrain.study.fits.rows import choose_rows, fit_study


@pytest.fixture
def study(synthetic):
    """Table of a study: every run has an evaluation in its middle and one at its end."""
    ends = synthetic(0.003).assign(final=True)
    ends["run"] = [f"run{i}" for i in ends.index]
    middles = ends.assign(final=False, tokens=ends["tokens"] / 2, loss=ends["loss"] * 1.1)
    table = pd.concat([ends, middles], ignore_index=True)
    return table.assign(
        study="small",
        arm="plain",
        family="autoregressive",
        likelihood="exact",
        seed=0,
        configuration=table["run"],
        noise_error=0.0,
    )


def said(notes, words):
    return any(words in note for note in notes)


def test_final_rows_are_taken(study):
    rows = choose_rows(study, "data_constrained")
    assert rows.table["final"].all()
    assert len(rows.table) == study["run"].nunique()
    assert rows.notes == ()


def test_a_run_that_did_not_end_is_counted(study):
    rows = choose_rows(study[~((study["run"] == "run3") & study["final"])], "data_constrained")
    assert "run3" not in set(rows.table["run"])
    assert said(rows.notes, "1 runs without an evaluation at their end")


def test_early_stopping_takes_the_lowest_loss_of_each_run(study):
    study.loc[(study["run"] == "run3") & ~study["final"], "loss"] = 1.0
    rows = choose_rows(study, "interior_optimum", pick="best").table.set_index("run")
    assert rows["loss"]["run3"] == 1.0
    assert not rows["final"]["run3"]
    assert rows["final"]["run4"]


def test_overfitted_rows_are_kept_from_monotone_laws_alone(study):
    long = study["final"] & (study["tokens"] == 40 * study["unique_tokens"])
    at = study.index[long][:4]
    study.loc[at, "loss"] *= 2
    monotone = choose_rows(study, "data_constrained")
    assert said(monotone.notes, "4 of 72 rows were left out as overfitted")
    assert len(monotone.table) == 68
    assert len(choose_rows(study, "interior_optimum").table) == 72


def test_a_rise_within_the_noise_is_no_overfitting():
    table = pd.DataFrame(
        {
            "params": 1e6,
            "unique_tokens": 1e6,
            "tokens": [1e6, 2e6, 4e6, 8e6],
            "loss": [4.0, 3.9, 3.93, 4.2],
            "noise_error": 0.02,
        }
    )
    assert list(rising(table)) == [False, False, False, True]
    assert list(rising(table.assign(noise_error=0.0))) == [False, False, True, True]
    assert list(rising(table.iloc[::-1])) == [True, False, False, False]


def test_the_first_stage_gets_no_repeated_tokens(study):
    rows = choose_rows(study, "single_epoch")
    assert (rows.table["tokens"] <= 1.01 * rows.table["unique_tokens"]).all()
    assert said(rows.notes, "54 rows with repeated tokens")


def test_a_fit_of_a_study_carries_what_was_left_out(study):
    fitted = fit_study(study, "single_epoch", arm="plain", check=False)
    assert fitted.source == "study small"
    assert said(fitted.warnings, "54 rows with repeated tokens")
    with pytest.raises(ConfigError, match="it has plain"):
        fit_study(study, "single_epoch", arm="tuned")


def test_likelihoods_are_not_mixed(study):
    study.loc[0, "likelihood"] = "bound"
    with pytest.raises(ConfigError, match="one likelihood"):
        fit_study(study, "data_constrained", check=False)


def test_single_epoch_fit_of_repeated_tokens(synthetic):
    warnings = fit_law(synthetic(0.003), "single_epoch", check=False).warnings
    assert said(warnings, "54 of 72 rows have repeated tokens")


def test_seeds_as_independent_points(synthetic):
    table = pd.concat([synthetic(0.003), synthetic(0.003, seed=1)], ignore_index=True)
    apart = table.assign(seed=np.arange(len(table)) // 72, configuration=table.index)
    together = table.assign(configuration=table.groupby(["params", "tokens"]).ngroup())
    words = "count as independent configurations"
    assert said(fit_law(apart, "data_constrained", check=False).warnings, words)
    assert not said(fit_law(together, "data_constrained", check=False).warnings, words)


def test_few_budgets_and_sizes(synthetic):
    table = synthetic(0.003)
    table = table[(table["unique_tokens"] < 5e7) & (table["params"] < 1e8)]
    table = table[table["params"] != table["params"].min()]
    warnings = fit_law(table, "data_constrained", tied={"beta": "alpha"}, check=False).warnings
    assert said(warnings, "only 2 unique-token budgets")
    assert said(warnings, "only 3 model sizes")
    few = fit_law(table.iloc[::3], "data_constrained", check=False).warnings
    assert said(few, "only 8 configurations for 7 coefficients")


def test_rounded_losses(synthetic):
    table = synthetic(0.003)
    rounded = table.assign(loss=table["loss"].round(2))
    words = "rounded or read from a figure"
    assert said(fit_law(rounded, "data_constrained", check=False).warnings, words)
    assert not said(fit_law(table, "data_constrained", check=False).warnings, words)


def test_an_unconverged_fit_is_reported(synthetic):
    from pretrain.study.fits.cautions import cautions
    from pretrain.study.fits.fit import cluster_codes, pose

    table = synthetic(0.01)
    problem = pose(table, "single_epoch")
    stopped = problem.at(problem.starts()[0])
    assert said(cautions(table, problem, stopped, cluster_codes(table)), "stopped early")
