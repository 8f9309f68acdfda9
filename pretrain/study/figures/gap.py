"""Gap of each arm to the reference arm at its best evaluation, against the unique budget."""

from __future__ import annotations

import math

import pandas as pd

from pretrain.study.early_stopping import Gap, gaps, outcomes, reference_arm, trend
from pretrain.study.figures.captions import counts, likelihoods
from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import arm_looks

NAME, TITLE = "gap", "Gap to the autoregressive reference and its trend"
UNIQUE = Axis("unique_tokens", "unique tokens U", log=True)


def gap_chart(table: pd.DataFrame, reference: str | None = None) -> Drawn:
    """Chart of the gap against U with error bars; `reference` defaults to the best AR arm."""
    found = outcomes(table)
    base = reference or reference_arm(found)
    if base is None:
        return Omitted(NAME, TITLE, "the study has no autoregressive arm to compare with")
    every = gaps(found, base)
    if not every:
        return Omitted(NAME, TITLE, f"no other arm shares a unique budget with `{base}`")
    looks = arm_looks(table)
    series = []
    for arm in dict.fromkeys(item.arm for item in every):
        part = [item for item in every if item.arm == arm]
        known = [item.error if math.isfinite(item.error) else math.nan for item in part]
        y = [item.gap for item in part]
        series.append(
            Series(
                label=f"{arm}\n{trend_text(part)}",
                x=[item.unique_tokens for item in part],
                y=y,
                low=[value - 2 * error for value, error in zip(y, known, strict=True)],
                high=[value + 2 * error for value, error in zip(y, known, strict=True)],
                color=looks[arm].color,
                marker=looks[arm].marker,
                filled=looks[arm].filled,
            )
        )
    budgets = [item.unique_tokens for item in every]
    x = Axis(UNIQUE.name, UNIQUE.label, True, (min(budgets) / 1.4, max(budgets) * 1.4))
    panel = Panel(
        "gap at the best evaluation of both",
        x,
        Axis("gap", "loss minus that of the reference\n(nats per token)"),
        tuple(series),
        level_line=(0.0, f"reference: {base}"),
    )
    return Chart(NAME, TITLE, _caption(table, base), (panel,), columns=1, panel_size=(8.2, 4.2))


def trend_text(part: list[Gap]) -> str:
    """Slope of the gap for ten times more unique tokens, with twice its error."""
    line = trend(part)
    if line is None:
        return "one budget: no trend"
    slope = f"{line.slope:+.3f}".replace("-", "\N{MINUS SIGN}")
    if math.isfinite(line.error):
        return f"{slope} ± {2 * line.error:.3f} a decade of U"
    return f"{slope} a decade of U (error unknown)"


def _caption(table: pd.DataFrame, base: str) -> str:
    return " ".join(
        [
            "Lowest validation loss of each arm minus the lowest of the reference "
            f"(`{base}`, the autoregressive arm with the lowest mean loss), both with early "
            "stopping, against the unique tokens. Below zero an arm is better than the reference.",
            counts(table),
            likelihoods(table),
            "Error bars are twice the standard error of noise draws and seeds of both runs. The "
            "slope is a straight line in log U weighted by these errors, with twice its standard "
            "error, which is enlarged where the points leave the line by more than their errors.",
            "The minimum of several noisy evaluations is a little low for both. The figure gives "
            "the gap and its trend over the budgets that were run, and no claim beyond them: the "
            "line is not to be continued to a crossing.",
        ]
    )
