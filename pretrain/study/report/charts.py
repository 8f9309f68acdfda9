"""All figures of a study's report, or the reasons why its data do not support them."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from pretrain.study.early_stopping import Outcome
from pretrain.study.efficiency import effective_tokens
from pretrain.study.figures.chart import Drawn
from pretrain.study.figures.contour import contour_chart, measured_of
from pretrain.study.figures.data_value import data_value_chart
from pretrain.study.figures.gap import gap_chart
from pretrain.study.figures.isoflop import isoflop_chart
from pretrain.study.figures.learning import learning_chart
from pretrain.study.figures.pareto import frontier_chart
from pretrain.study.figures.residuals import residual_chart
from pretrain.study.report.crossing import crossing_chart
from pretrain.study.report.laws import ArmFit, Laws, data_constrained, isoflop_studies
from pretrain.study.report.observed import observed_crossings

MAX_LAWS = 4


def draw_all(
    table: pd.DataFrame, found: Sequence[Outcome], laws: Laws, reference: str | None
) -> list[Drawn]:
    """Charts in the order of the report."""
    challenger = best_challenger(found)
    measured = observed_crossings(table, challenger, reference or "")
    budgets = sorted({float(item.unique_tokens) for item in found})
    return [
        learning_chart(table),
        gap_chart(table, reference),
        frontier_chart(table),
        isoflop_chart(isoflop_studies(table)),
        _contour(table, data_constrained(laws.fits)),
        crossing_chart(laws.chosen, budgets, (challenger, reference or ""), measured),
        residual_chart([(fit.fitted, fit.rows) for fit in laws.fits if fit.chosen][:MAX_LAWS]),
        _data_value(table),
    ]


def best_challenger(found: Sequence[Outcome]) -> str:
    """Arm of another family than AR with the lowest loss at the largest budget; "" for none."""
    others = [item for item in found if item.family != "autoregressive"]
    largest = max((item.unique_tokens for item in others), default=0.0)
    at_largest = [item for item in others if item.unique_tokens == largest]
    best = min(at_largest, key=lambda item: (item.best.loss, item.arm), default=None)
    return "" if best is None else best.arm


def _contour(table: pd.DataFrame, laws: Sequence[ArmFit]) -> Drawn:
    """Contours at the budget with the most ends of schedules."""
    ends = table[table["final"].fillna(False).astype(bool)]
    counts = ends.groupby("unique_tokens").size().sort_index()
    if counts.empty or not laws:
        return contour_chart([], 1.0)
    unique = float(counts.idxmax())
    shown = []
    for fit in laws[:MAX_LAWS]:
        arm, family = fit.fitted.arm, fit.fitted.family
        here = ends[(ends["unique_tokens"] == unique) & (ends["family"] == family)]
        shown.append((fit.fitted, measured_of(here[here["arm"] == arm])))
    return contour_chart(shown, unique)


def _data_value(table: pd.DataFrame) -> Drawn:
    """Effective tokens of each arm at its best size; values outside the baseline are left out."""
    curves = effective_tokens(table)
    families = table[["arm", "family"]].drop_duplicates()
    curves = curves.merge(families, on="arm", how="left")
    if len(curves):
        # One line an arm: of the sizes, the one with the lowest loss at each number of epochs.
        keys = ["arm", "unique_tokens", "epochs"]
        curves = curves.loc[curves.groupby(keys)["loss"].idxmin()]
    inside = curves["relation"] == "equal"
    repeated = inside & (curves["epochs"] > 1.01)
    remark = ""
    if len(curves) and not repeated.any():
        remark = "no repeated run has a loss inside the one-epoch baseline of its recipe"
        curves = curves.iloc[:0]
    elif len(curves):
        outside = int((~inside).sum())
        if outside:
            remark = (
                f"{outside} of {len(curves)} runs lie outside their baseline: lines break there."
            )
        # An interval that leaves the baseline is open there and is not drawn as if it were closed.
        closed = inside & (curves["low"] > 0) & curves["high"].lt(float("inf"))
        if (inside & ~closed).any():
            remark += f" {int((inside & ~closed).sum())} intervals leave the baseline: not drawn."
        curves = curves.assign(
            effective_tokens=curves["effective_tokens"].where(inside),
            low=curves["low"].where(closed),
            high=curves["high"].where(closed),
        )
        kept = set(curves.loc[repeated, "unique_tokens"])
        curves = curves[curves["unique_tokens"].isin(kept)]
    return data_value_chart(
        curves, "90 % from the errors of the losses of runs and baseline", remark.strip()
    )
