"""Value of repeated data: fresh tokens that would give the same loss, against epochs."""

from __future__ import annotations

import pandas as pd

from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import arm_looks, quantity

NAME, TITLE = "data_value", "Value of repeated data"
MAX_BUDGETS = 3


def data_value_chart(values: pd.DataFrame, interval: str = "", remark: str = "") -> Drawn:
    """Chart of effective over unique tokens against epochs.

    `values` has columns `arm`, `family`, `unique_tokens`, `epochs`, `effective_tokens`, `low`,
    `high` (ends of the interval), empty where unknown; `interval` says what they mean.
    """
    if values.empty:
        reason = remark or (
            "it needs one-epoch runs of the same recipe at several budgets, between whose losses "
            "those of the repeated runs lie"
        )
        return Omitted(NAME, TITLE, reason)
    looks = arm_looks(values)
    budgets = sorted(set(values["unique_tokens"]))
    if len(budgets) > MAX_BUDGETS:
        budgets = [budgets[0], budgets[len(budgets) // 2], budgets[-1]]
    panels = []
    for unique in budgets:
        here = values[values["unique_tokens"] == unique].sort_values("epochs")
        series = []
        for arm, rows in here.groupby("arm"):
            look = looks[str(arm)]
            known = bool(rows["low"].notna().any())
            series.append(
                Series(
                    str(arm), rows["epochs"].to_list(),
                    (rows["effective_tokens"] / unique).to_list(),
                    low=(rows["low"] / unique).to_list() if known else None,
                    high=(rows["high"] / unique).to_list() if known else None,
                    color=look.color, marker=look.marker, filled=look.filled,
                )
            )  # fmt: skip
        ends = [float(here["epochs"].min()), float(here["epochs"].max())]
        series.append(
            Series("as good as fresh", ends, ends, color="#6b7280", marker="", line=":", width=1.2)
        )
        x = Axis("epochs", "epochs over the unique tokens", log=True)
        y = Axis("effective_over_unique", "fresh tokens of equal loss, over U", log=True)
        panels.append(Panel(f"{quantity(unique)} unique tokens", x, y, tuple(series)))
    return Chart(
        name=NAME,
        title=TITLE,
        caption=_caption(values, interval, remark),
        panels=tuple(panels),
        columns=len(panels),
        labels="legend" if len(panels) > 1 else "ends",
        panel_size=(4.5, 3.7) if len(panels) > 1 else (7.6, 4.4),
    )


def _caption(values: pd.DataFrame, interval: str, remark: str) -> str:
    parts = [
        "Number of fresh tokens with which one epoch of the same recipe reaches the loss of each "
        "run, divided by its unique tokens; on the dotted line a repetition is as good as fresh "
        f"text. Of the sizes of an arm, the one with the lowest loss at each number of epochs. "
        f"n = {int(values['effective_tokens'].notna().sum())} runs.",
        f"Intervals: {interval}." if interval else "Errors are not known.",
        "The value is interpolated between one-epoch runs and is given only where their losses "
        "enclose the loss of the run. It compares a recipe with itself: a high value may also mean "
        "a weak baseline.",
    ]
    if remark:
        parts.append(remark)
    return " ".join(parts)
