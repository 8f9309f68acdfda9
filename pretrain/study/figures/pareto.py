"""Pareto frontier: lowest validation loss that each arm reached for at most a given compute."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pretrain.study.early_stopping import averaged
from pretrain.study.figures.captions import ERRORS, counts, likelihoods
from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import arm_looks, quantity

NAME, TITLE = "frontier", "Pareto frontier of loss and compute"
MAX_BUDGETS = 3
FEW = 4
"""Evaluations of an arm below which its minimum says little."""


def frontier(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that no other row beats with at most their FLOPs, in the order of FLOPs."""
    ordered = rows.sort_values(["flops", "loss"])
    before = ordered["loss"].cummin().shift(fill_value=np.inf)
    return ordered[ordered["loss"] < before]


def frontier_chart(table: pd.DataFrame) -> Drawn:
    """Chart of all evaluations and the frontier of each arm, one panel a budget."""
    means = averaged(table)
    if means.empty:
        return Omitted(NAME, TITLE, "no run has an evaluation yet")
    budgets = _ends_and_middle(sorted(set(means["unique_tokens"])))
    looks = arm_looks(table)
    panels = []
    for unique in budgets:
        here = means[means["unique_tokens"] == unique]
        series: list[Series] = []
        for arm, rows in here.groupby("arm"):
            look, best = looks[str(arm)], frontier(rows)
            series.append(
                Series(
                    f"{arm} (all evaluations)",
                    rows["flops"].to_list(),
                    rows["loss"].to_list(),
                    color=look.color,
                    marker=look.marker,
                    filled=False,
                    line="",
                    size=3,
                    shown=False,
                )
            )
            error = 2 * best["error"].where(np.isfinite(best["error"]))
            series.append(
                Series(
                    str(arm),
                    best["flops"].to_list(),
                    best["loss"].to_list(),
                    low=(best["loss"] - error).to_list(),
                    high=(best["loss"] + error).to_list(),
                    color=look.color,
                    marker=look.marker,
                    filled=look.filled,
                    steps=True,
                )
            )
        x = Axis("flops", "training FLOPs", log=True)
        y = Axis("loss", "validation loss (nats per token)", limits=_limits(here))
        panels.append(Panel(f"{quantity(unique)} unique tokens", x, y, tuple(series)))
    return Chart(
        name=NAME,
        title=TITLE,
        caption=_caption(table, means, budgets),
        panels=tuple(panels),
        columns=len(budgets),
        labels="legend" if len(panels) > 1 else "ends",
        panel_size=(4.6, 3.8) if len(panels) > 1 else (7.6, 4.4),
    )


def _ends_and_middle(values: Sequence[float]) -> list[float]:
    if len(values) <= MAX_BUDGETS:
        return list(values)
    return [values[0], values[len(values) // 2], values[-1]]


def _limits(rows: pd.DataFrame) -> tuple[float, float]:
    """Range from the lowest loss to the upper quartile, as early losses say little of frontiers."""
    low, high = float(rows["loss"].min()), float(rows["loss"].quantile(0.8))
    high = max(high, low + 0.2)
    return low - 0.06 * (high - low), high + 0.04 * (high - low)


def _caption(table: pd.DataFrame, means: pd.DataFrame, budgets: list[float]) -> str:
    parts = [
        "Steps: lowest loss of each arm for at most the given training FLOPs (attention and head "
        "counted). Small marks: all evaluations, of all sizes and lengths; the fifth with the "
        "highest losses lies above the panel.",
        counts(table),
        likelihoods(table),
        ERRORS,
        "A frontier is the minimum of few points: it depends on the grid of sizes and lengths, and "
        "is comparable only where both arms have points of similar compute.",
    ]
    every = means.groupby(["unique_tokens", "arm"]).size()
    scarce = every[every < FEW]
    if len(scarce):
        parts.append(f"{len(scarce)} of {len(every)} frontiers rest on fewer than {FEW} points.")
    if len(budgets) < means["unique_tokens"].nunique():
        parts.append(f"{len(budgets)} of {means['unique_tokens'].nunique()} budgets are drawn.")
    return " ".join(parts)
