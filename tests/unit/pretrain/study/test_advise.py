"""Advice from fits, and the command that gives it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from pretrain.cli.main import app
from pretrain.cli.study_advise import read_fits, sections, to_dict
from pretrain.errors import ConfigError
from pretrain.study.advise import advise, published_pair
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.published import published, published_law
from pretrain.study.frontier import saturation

AR, MASKED = published_pair()
BUDGET = ["study", "advise", "--unique-tokens", "100M", "--flops", "1e21"]


def spread(fitted, count=30, size=0.002, seed=0):
    rng = np.random.default_rng(seed)
    values = {k: v * np.exp(size * rng.standard_normal(count)) for k, v in fitted.values.items()}
    return replace(fitted, resamples={k: v.tolist() for k, v in values.items()})


def test_the_objective_changes_at_the_crossing():
    at = advise([AR, MASKED], 1e8, 1e20).crossings[0].flops
    before, after = (advise([AR, MASKED], 1e8, c * at) for c in (0.9, 1.1))
    assert before.recommended.fitted.family == "autoregressive"
    assert after.recommended.fitted.family == "masked"
    assert after.crossings[0].distance == pytest.approx(1.1)
    assert after.published_critical == pytest.approx(4.7e19, rel=0.01)


def test_the_advice_is_the_best_of_a_grid_within_the_budget():
    params = np.geomspace(1e6, 1e11, 1501)
    flops = 3e19 * np.geomspace(1e-4, 1, 301)[:, None]
    for option in advise([AR, MASKED], 1e8, 3e19).options:
        losses = option.fitted.loss(params, flops / 6 / params, 1e8)
        assert option.best.loss == pytest.approx(losses.min(), abs=1e-4)
        assert option.best.loss <= losses.min()
        at = option.best
        assert 6 * at.params * at.epochs * 1e8 == pytest.approx(3e19)
        low, high = option.sizes
        for size in (low, high):
            loss = float(option.fitted.loss(size, 3e19 / 6 / size, 1e8))
            assert loss == pytest.approx(at.loss + 0.01, abs=1e-3)


def test_useless_compute_is_not_spent():
    advice = advise([AR], 1e8, 1e25)
    assert advice.recommended.best.flops == pytest.approx(float(saturation(AR, 1e8)))
    assert advice.crossings == ()


def test_the_measured_allocation_stays_inside_the_data():
    for option in advise([AR, MASKED], 5e7, 1e23).options:
        found, support = option.measured, option.fitted.support
        for name in ("params", "epochs", "flops"):
            low, high = support[name]
            assert low <= getattr(found, name) <= high * (1 + 1e-9)
        assert found.loss >= option.best.loss - 2e-3
    assert advise([AR], 1e10, 1e23).options[0].measured is None
    assert advise([replace(AR, support={})], 5e7, 1e23).options[0].measured is None


def test_what_lies_outside_the_data_is_said():
    assert advise([MASKED], 5e7, 1e19).options[0].supported
    assert not advise([MASKED], 1e8, 1e21).options[0].supported
    inside = advise([MASKED], 5e7, 1e19).options[0].warnings
    assert not any("outside the data" in text for text in inside)
    assert any("does not know overfitting" in text for text in inside)
    outside = advise([MASKED], 1e8, 1e21).options[0].warnings
    assert any("flops 1e+21 lies above the measured" in text for text in outside)
    assert any("epochs beyond the measured 800 are extrapolation" in text for text in outside)
    assert set(MASKED.warnings) <= set(outside)
    unknown = advise([replace(MASKED, support={})], 1e8, 1e20).options[0].warnings
    assert any("not recorded" in text for text in unknown)
    rising = advise([published_law("quokka_interior_optimum")], 1e8, 1e21).options[0]
    assert not any("cannot rise" in text for text in rising.warnings)


def test_resamples_give_intervals_and_confidence():
    fits = [spread(AR), spread(MASKED, seed=1)]
    advice = advise(fits, 1e8, 1e21)
    assert advice.confidence == 1
    for option in advice.options:
        assert option.loss_interval[0] < option.best.loss < option.loss_interval[1]
        assert option.params_interval[0] < option.best.params < option.params_interval[1]
        assert option.epochs_interval[0] < option.best.epochs < option.epochs_interval[1]
        assert not any("no resamples" in text for text in option.warnings)
    low, high = advice.crossings[0].interval
    assert low < advice.crossings[0].flops < high
    close = advise(fits, 1e8, advice.crossings[0].flops)
    assert 0.05 < close.confidence < 0.95
    assert advise([AR, MASKED], 1e8, 1e21).confidence is None


def test_a_law_that_knows_no_repetition_is_left_out_where_tokens_repeat():
    fresh = published_law("besiroglu")
    advice = advise([fresh, MASKED], 1e8, 1e20)
    assert [option.fitted for option in advice.options] == [MASKED]
    assert "knows no repetition" in advice.warnings[0]
    assert advise([fresh], 1e12, 1e20).recommended.best.epochs < 1
    with pytest.raises(ConfigError, match="repeated tokens"):
        advise([fresh], 1e8, 1e20)


def test_fits_of_different_origin_are_not_compared_silently():
    other = published_law("muennighoff")
    assert any("origins" in text for text in advise([other, MASKED], 1e8, 1e20).warnings)
    assert not any("origins" in text for text in advise([AR, MASKED], 1e8, 1e20).warnings)


def test_no_crossing_is_null_in_json_and_named_for_people():
    worse = replace(MASKED, values=MASKED.values | {"E": 5.0}, source=AR.source)
    advice = advise([AR, worse], 1e8, 1e20)
    stored = json.loads(json.dumps(to_dict(advice), allow_nan=False))
    assert stored["crossings"][0]["flops"] is None
    assert stored["crossings"][0]["kind"] == "none"
    cells = [cell for part in sections(advice) for row in part.rows for cell in row]
    assert "no crossing" in cells
    better = replace(MASKED, values=AR.values | {"E": 1.0})
    assert to_dict(advise([AR, better], 1e8, 1e20))["crossings"][0]["kind"] == "from one epoch on"


def test_the_command_prints_tables_and_json():
    run = CliRunner()
    text = run.invoke(app, BUDGET)
    assert text.exit_code == 0, text.output
    for part in ("masked", "printed law", "CAUTION", "outside the data", "arXiv 2507.15857"):
        assert part in text.stdout
    stored = json.loads(run.invoke(app, [*BUDGET, "--json"]).stdout)
    assert stored["recommended"] == "masked"
    assert stored["unique_tokens"] == 1e8
    assert stored["options"][0]["source"] == MASKED.source
    assert stored["crossings"][0]["flops"] == pytest.approx(7.55e19, rel=1e-3)


def test_fits_are_read_from_files_of_lists_and_objects_and_by_name(tmp_path):
    fits = [spread(AR, 3), MASKED]
    path = tmp_path / "fits.json"
    path.write_text(json.dumps([fitted.to_dict() for fitted in fits]))
    assert [f.to_dict() for f in read_fits(str(path))] == [f.to_dict() for f in fits]
    path.write_text(json.dumps({name: fitted.to_dict() for name, fitted in published().items()}))
    assert len(read_fits(str(path))) == len(published())
    assert read_fits("muennighoff") == [published_law("muennighoff")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "no JSON"),
        ("[]", "one fit or more"),
        ("3", "one fit or more"),
        ("[3]", "a fit is an object"),
        ('[{"law_name": "data_constrained"}]', "is no fit"),
        ('[{"law_name": "other", "values": {}, "family": "masked"}]', "unknown law"),
        ('[{"law_name": "single_epoch", "values": {"A": 1}, "family": "m"}]', "coefficient B"),
        ('[{"law_name": "single_epoch", "values": 3, "family": "m"}]', "no fit"),
        (
            '[{"law_name": "single_epoch", "values": {"A": 1, "B": 1, "E": 1, "alpha": 1, '
            '"beta": 1}, "family": "m", "resamples": {"A": [1]}}]',
            "resamples",
        ),
        (
            '[{"law_name": "single_epoch", "values": {"A": 1, "B": 1, "E": 1, "alpha": 1, '
            '"beta": 1}, "family": "m", "support": {"params": 3}}]',
            "no fit",
        ),
    ],
)
def test_unusable_files_of_fits_are_user_errors(tmp_path, content, message):
    path = tmp_path / "fits.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_fits(str(path))


@pytest.mark.parametrize(
    "given",
    [("lots", "1e21"), ("100M", "-1"), ("0", "1e21"), ("100M", "0"), ("100M", "1e99")],
)
def test_unusable_amounts_are_user_errors(given):
    found = CliRunner().invoke(
        app, ["study", "advise", f"--unique-tokens={given[0]}", f"--flops={given[1]}"]
    )
    assert isinstance(found.exception, ConfigError)
    assert found.exception.exit_code == 2


def test_a_law_that_rises_states_where_the_size_turns():
    values = {"A": 400.0, "B": 900.0, "E": 1.7, "alpha": 0.33, "beta": 0.3, "p": 0.6}
    values |= {"gamma": 1.2, "c": 20.0, "m": 0.1, "k": 0.1}
    rising = Fitted("interior_optimum", values, "autoregressive")
    option = advise([rising], 1e8, 1e24).options[0]
    around = option.turn * np.array([0.95, 1.0, 1.05])
    losses = rising.loss(option.best.params, around * 1e8, 1e8)
    assert losses.argmin() == 1
    cells = [row[0] for part in sections(advise([rising], 1e8, 1e24)) for row in part.rows]
    assert "loss of this size rises" in cells
    assert advise([MASKED], 1e8, 1e20).options[0].turn is None
