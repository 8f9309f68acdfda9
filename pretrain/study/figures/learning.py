"""Validation loss of every arm against epochs and against training FLOPs, one column a budget."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from pretrain.study.early_stopping import Outcome, averaged, outcomes
from pretrain.study.figures.captions import ERRORS, counts, likelihoods
from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import Look, arm_looks, quantity

NAME, TITLE = "loss", "Validation loss over epochs and compute"
MAX_BUDGETS, MAX_ARMS = 3, 6
EPOCHS = Axis("epochs", "epochs over the unique tokens", log=True)
FLOPS = Axis("flops", "training FLOPs", log=True)
LOSS = Axis("loss", "validation loss (nats per token)")
KEYS = (
    Series("best evaluation (early stopping)", [], [], color="#444444", marker="*", line=""),
    Series("after it, where the run overfits", [], [], color="#444444", line="--", marker=""),
)
"""Entries of the legend alone."""


def learning_chart(table: pd.DataFrame) -> Drawn:
    """Chart of the loss over epochs and compute, each arm at its best size, with its turn."""
    found = outcomes(table)
    if not found:
        return Omitted(NAME, TITLE, "no run has an evaluation yet")
    budgets = _budgets(found)
    arms = _arms(found)
    means, looks = averaged(table), arm_looks(table)
    chosen = [item for item in found if item.unique_tokens in budgets and item.arm in arms]
    panels = []
    for axis in (EPOCHS, FLOPS):
        for unique in budgets:
            here = [item for item in chosen if item.unique_tokens == unique]
            series = [part for item in here for part in _curve(means, item, axis.name, looks)]
            over = "epochs" if axis is EPOCHS else "FLOPs"
            title = f"{quantity(unique)} unique tokens, over {over}"
            y = Axis(LOSS.name, LOSS.label, limits=_limits(means, here))
            panels.append(Panel(title, axis, y, (*series, *KEYS)))
    return Chart(
        name=NAME,
        title=TITLE,
        caption=_caption(table, found, budgets, arms),
        panels=tuple(panels),
        columns=len(budgets),
        labels="legend",
        panel_size=(4.4 if len(budgets) > 1 else 5.6, 3.3),
    )


def drawn_rows(means: pd.DataFrame, item: Outcome) -> pd.DataFrame:
    """Evaluations of the best size and setting of an arm at one budget, in the order of epochs.

    Where runs of several lengths were made these are the ends of their schedules, as an evaluation
    at a high learning rate is no member of that curve; else all evaluations of the run.
    """
    rows = means[
        (means["arm"] == item.arm)
        & (means["unique_tokens"] == item.unique_tokens)
        & (means["params"] == item.best.params)
        & (means["setting"] == item.best.setting)
    ]
    ends = rows[rows["final"]]
    if ends["epochs"].nunique() > 1:
        rows = ends
    else:
        rows = rows[rows["configuration"] == item.best.configuration]
    return rows.sort_values("epochs")


def _curve(means: pd.DataFrame, item: Outcome, x: str, looks: dict[str, Look]) -> list[Series]:
    """Line of one arm; dashed after the best evaluation where the rise is significant; a star."""
    rows, look = drawn_rows(means, item), looks[item.arm]
    parts = [(rows, "-" if not item.overfits else "split")]
    if item.overfits:
        at = item.best.epochs
        parts = [(rows[rows["epochs"] <= at], "-"), (rows[rows["epochs"] >= at], "--")]
    series = []
    for at_part, (part, line) in enumerate(parts):
        error = 2 * part["error"].where(np.isfinite(part["error"]))
        bars = bool((error > 0).any())
        series.append(
            Series(
                label=item.arm if at_part == 0 else f"{item.arm} (overfits)",
                x=part[x].to_list(),
                y=part["loss"].to_list(),
                low=(part["loss"] - error).to_list() if bars else None,
                high=(part["loss"] + error).to_list() if bars else None,
                color=look.color,
                marker=look.marker,
                filled=look.filled,
                line="-" if line == "-" else "--",
                shown=at_part == 0,
            )
        )
    best = [getattr(item.best, x)], [item.best.loss]
    star = f"{item.arm} (best)"
    series.append(Series(star, *best, color=look.color, marker="*", line="", shown=False, size=5))
    return series


def _budgets(found: list[Outcome]) -> list[float]:
    """At most three budgets: the ends and the middle."""
    every = sorted({item.unique_tokens for item in found})
    if len(every) <= MAX_BUDGETS:
        return every
    return [every[0], every[len(every) // 2], every[-1]]


def _arms(found: list[Outcome]) -> list[str]:
    """At most six arms, those with the lowest loss."""
    best: dict[str, float] = {}
    for item in found:
        best[item.arm] = min(best.get(item.arm, math.inf), item.best.loss)
    return sorted(best, key=lambda arm: (best[arm], arm))[:MAX_ARMS]


def _limits(means: pd.DataFrame, chosen: list[Outcome]) -> tuple[float, float]:
    """Range of losses; early evaluations far above all optima would hide the turns."""
    low = min(item.best.loss for item in chosen)
    tops = [float(drawn_rows(means, item)["loss"].max()) for item in chosen]
    worst = max(max(item.best.loss, item.final.loss) for item in chosen)
    high = max(min(max(tops), low + max(2.2 * (worst - low), 0.3)), low + 0.05)
    return low - 0.06 * (high - low), high + 0.04 * (high - low)


def _caption(
    table: pd.DataFrame, found: list[Outcome], budgets: list[float], arms: list[str]
) -> str:
    parts = [
        "Validation loss of each arm at the size and setting with its lowest loss, over epochs "
        "(above) and over training FLOPs with attention and head (below). Losses far above the "
        "optima lie outside the panels. A star marks the best evaluation, "
        "which early stopping keeps. The line is dashed after it where the last loss is higher by "
        "more than twice the error: the run overfits.",
        counts(table),
        likelihoods(table),
        ERRORS,
    ]
    every = {item.unique_tokens for item in found}
    if len(budgets) < len(every):
        parts.append(f"{len(budgets)} of {len(every)} budgets are drawn; the table has all.")
    if len(arms) < len({item.arm for item in found}):
        parts.append(f"The {len(arms)} arms with the lowest losses are drawn; the table has all.")
    parts.append(
        "An arm whose line still falls at its end has no optimum here, and its best loss is an "
        "upper limit of what it can reach."
    )
    return " ".join(parts)
