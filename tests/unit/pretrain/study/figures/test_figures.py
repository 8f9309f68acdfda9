"""Files of figures: their numbers, determinism, and what data do not support."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from study_tables import curves

from pretrain.study.figures.chart import Chart, Omitted
from pretrain.study.figures.critical import CriticalLine, critical_chart
from pretrain.study.figures.drawing import write_chart
from pretrain.study.figures.gap import gap_chart
from pretrain.study.figures.interactive import figure_json
from pretrain.study.figures.isoflop import isoflop_chart
from pretrain.study.figures.learning import learning_chart
from pretrain.study.figures.pareto import frontier_chart
from pretrain.study.figures.style import arm_looks, log_ticks, power, quantity, spread
from pretrain.study.fits.isoflop import parabolas
from pretrain.study.report.laws import study_of

pytestmark = pytest.mark.filterwarnings("error::UserWarning")
"""matplotlib warns where a layout does not fit."""

SHARED = Path(__file__).resolve().parents[6] / "shared" / "data" / "scaling"


def numbers(chart: object, folder: Path) -> pd.DataFrame:
    assert isinstance(chart, Chart), chart
    return pd.read_csv(write_chart(chart, folder).files["csv"])


def test_losses_in_the_csv_are_those_of_the_table(tmp_path: Path) -> None:
    table = curves()
    shown = numbers(learning_chart(table), tmp_path)
    for arm in ("ar", "mdm"):
        for unique, title in ((1e5, "100 k"), (1e6, "1 M")):
            part = shown[shown["panel"] == f"{title} unique tokens, over FLOPs"]
            part = part[part["series"].isin([arm, f"{arm} (overfits)"])]
            part = part.drop_duplicates("flops").sort_values("flops")
            rows = table[(table["arm"] == arm) & (table["unique_tokens"] == unique)]
            np.testing.assert_allclose(part["loss"], rows["loss"], rtol=1e-7)
            np.testing.assert_allclose(part["flops"], rows["flops"], rtol=1e-7)
    overfitted = shown[shown["series"] == "ar (overfits)"]
    assert overfitted["epochs"].dropna().min() == 8
    assert not shown["series"].str.startswith("mdm (overfits)").any()
    masked = shown[(shown["series"] == "mdm") & shown["epochs"].notna()]
    np.testing.assert_allclose(masked["loss_high"] - masked["loss"], 0.02, rtol=1e-5)


def test_gap_in_the_csv(tmp_path: Path) -> None:
    shown = numbers(gap_chart(curves()), tmp_path)
    points = shown[shown["unique_tokens"].notna()]
    np.testing.assert_allclose(points["gap"], [-0.1, -0.1], atol=1e-9)
    np.testing.assert_allclose(points["gap_high"] - points["gap_low"], 0.04, rtol=1e-6)


def test_frontier_is_what_nothing_beats(tmp_path: Path) -> None:
    table = curves()
    shown = numbers(frontier_chart(table), tmp_path)
    for arm in ("ar", "mdm"):
        front = shown[(shown["series"] == arm) & (shown["panel"] == "1 M unique tokens")]
        rows = table[(table["arm"] == arm) & (table["unique_tokens"] == 1e6)]
        expected = [
            one for one in rows.itertuples()
            if not ((rows["flops"] <= one.flops) & (rows["loss"] < one.loss)).any()
        ]  # fmt: skip
        np.testing.assert_allclose(front["loss"], [one.loss for one in expected], rtol=1e-7)


def test_same_table_same_bytes(tmp_path: Path) -> None:
    charts = [learning_chart(curves()) for _ in range(2)]
    assert all(isinstance(chart, Chart) for chart in charts)
    first, second = (write_chart(c, tmp_path / str(i)) for i, c in enumerate(charts))  # type: ignore[arg-type]
    for kind in ("png", "svg", "csv"):
        assert first.files[kind].read_bytes() == second.files[kind].read_bytes(), kind
    assert figure_json(charts[0]) == figure_json(charts[1])  # type: ignore[arg-type]


def test_figures_without_their_data_say_so() -> None:
    table = curves()
    masked = table[table["family"] == "masked"]
    empty = table.iloc[:0]
    for omitted in (
        gap_chart(masked), learning_chart(empty), frontier_chart(empty), isoflop_chart([]),
        critical_chart([CriticalLine("none", [1e6], [np.inf])]),
    ):  # fmt: skip
        assert isinstance(omitted, Omitted)
        assert omitted.reason


def test_an_open_band_leaves_the_panel(tmp_path: Path) -> None:
    line = CriticalLine("law", [1e6, 1e7], [1e15, 1e17], [5e14, 1e16], [2e15, np.inf])
    chart = critical_chart([line])
    assert isinstance(chart, Chart)
    series, limits = chart.panels[0].series[0], chart.panels[0].y.limits
    assert series.high is not None and limits is not None
    assert series.high[0] == 2e15
    assert limits[1] < series.high[1] < np.inf
    write_chart(chart, tmp_path)


@pytest.mark.skipif(not SHARED.exists(), reason="published points are not on this machine")
def test_published_optima(tmp_path: Path) -> None:
    """Stars of Quokka's isoFLOP points are the minima of approach 2, N = .0216 C^.514."""
    points = pd.read_csv(SHARED / "quokka_isoflop_points.csv", comment="#")
    points = points.rename(columns={"train_loss": "loss", "flops": "flops_6nd"})
    study = study_of("masked", "masked", points.assign(likelihood="bound"))
    assert study.exponent == pytest.approx(0.514, abs=0.001)
    expected = parabolas(points.rename(columns={"flops_6nd": "flops"})).budgets
    found = [curve.best_params for curve in study.curves if curve.coefficients is not None]
    np.testing.assert_allclose(found, expected["params"], rtol=1e-6)
    shown = numbers(isoflop_chart([study]), tmp_path)
    optima = shown[
        (shown["panel"] == "compute-optimal size") & (shown["series"].str.contains("C\\^"))
    ]
    np.testing.assert_allclose(optima["params"], expected["params"], rtol=1e-6)


def test_ticks_are_round_and_few() -> None:
    assert log_ticks(1, 300) == [1, 3, 10, 30, 100, 300]
    assert log_ticks(1e15, 1e21) == [10.0**e for e in range(15, 22)]
    for high in np.geomspace(2, 1e12, 60):
        assert 1 <= len(log_ticks(1, float(high))) <= 7
    assert [quantity(v) for v in (7, 1e5, 1.5e6, 2e10)] == ["7", "100 k", "1.5 M", "20 B"]
    assert power(2e18) == "2×10¹⁸"  # noqa: RUF001


def test_labels_keep_their_distance() -> None:
    placed = spread([0.5, 0.51, 0.52, 0.99], 0.1, 0, 1)
    ordered = sorted(placed)
    assert min(b - a for a, b in pairwise(ordered)) >= 0.1 - 1e-12
    assert ordered[0] >= 0 and ordered[-1] <= 1


def test_arms_differ_in_look_and_keep_the_colour_of_their_family() -> None:
    table = pd.DataFrame(
        {"arm": ["ar", "ar, tuned", "mdm"], "family": ["autoregressive"] * 2 + ["masked"]}
    )
    looks = arm_looks(table)
    assert len(set(looks.values())) == 3
    assert looks["ar"].marker == looks["ar, tuned"].marker != looks["mdm"].marker
    assert looks["mdm"].color == arm_looks(table[table["family"] == "masked"])["mdm"].color
