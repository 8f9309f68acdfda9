"""Critical compute of a study's laws: the figure of its best pair and a table of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.study.closed_form import closed_form
from pretrain.study.critical import (
    REFERENCE,
    CriticalLine,
    critical_line,
    num_resamples,
    published_critical,
)
from pretrain.study.figures.chart import Drawn
from pretrain.study.figures.critical import CriticalLine as DrawnLine
from pretrain.study.figures.critical import critical_chart
from pretrain.study.figures.style import power, quantity
from pretrain.study.fits.fitted import Fitted
from pretrain.study.report.html import paragraph, table

POINTS = 9
BEYOND = 3.0
"""Factor by which the line goes on beyond the budgets of the data."""


def pairs(fits: Sequence[Fitted]) -> list[tuple[Fitted, Fitted]]:
    """Every fit of another family with every autoregressive one."""
    return [
        (ours, theirs)
        for theirs in fits
        if theirs.family == REFERENCE
        for ours in fits
        if ours.family != REFERENCE
    ]


def crossing_table(fits: Sequence[Fitted], budgets: Sequence[float]) -> str:
    """Critical compute of all pairs at the budgets of the study, with intervals."""
    rows = []
    for ours, theirs in pairs(fits):
        line = critical_line(ours, theirs, budgets)
        for at, unique in enumerate(budgets):
            rows.append(
                (
                    ours.arm,
                    theirs.arm,
                    quantity(unique),
                    flops_text(float(line.flops[at])),
                    _interval(line, at),
                    "yes" if line.supported[at] else "no: extrapolated",
                    power(float(published_critical(unique))),
                )
            )
    if not rows:
        text = (
            "Not computed: it needs a data-constrained law of an autoregressive arm and of another "
            "family; see the fits for what is missing."
        )
        return paragraph(text, "omitted")
    headers = (
        "arm", "against", "unique tokens", "critical FLOPs", "90 % interval", "inside the data",
        "law printed in arXiv 2507.15857",
    )  # fmt: skip
    caption = (
        "Least compute C = 6 N D at which the law of the arm predicts a lower loss than that of "
        "the other one, both at their best size: numeric crossing of the full laws. The printed "
        "law is for other data and another recipe."
    )
    return table(headers, rows, caption)


def flops_text(flops: float) -> str:
    """Critical compute in words where it is no number."""
    if np.isinf(flops):
        return "no crossing"
    return "better from one epoch on" if flops == 0 else power(flops)


def _interval(line: CriticalLine, at: int) -> str:
    if line.band is None:
        return "not computed"
    low, high = (float(end[at]) for end in line.band)
    return f"{flops_text(low)} to {flops_text(high)}"


def crossing_chart(fits: Sequence[Fitted], budgets: Sequence[float], arms: Sequence[str]) -> Drawn:
    """Chart of the pair of the two arms; `arms` are the challenger and the reference."""
    chosen = [(o, t) for o, t in pairs(fits) if (o.arm, t.arm) == tuple(arms)] or pairs(fits)
    if not chosen:
        return critical_chart([])
    ours, theirs = chosen[0]
    ends = min(budgets) / BEYOND, max(budgets) * BEYOND
    unique = np.unique(np.concatenate([np.geomspace(*ends, POINTS), np.asarray(budgets, float)]))
    line = critical_line(ours, theirs, list(unique))
    band = line.band
    count = max(num_resamples(ours), num_resamples(theirs))
    flops = np.where(line.flops > 0, line.flops, np.nan)
    lines = [
        DrawnLine(
            "crossing of the laws",
            list(unique),
            list(flops),
            low=None if band is None else list(band[0]),
            high=None if band is None else list(band[1]),
            band="" if band is None else f"90 % of {count} resamples of configurations",
        ),
        DrawnLine(
            "closed form", list(unique), list(closed_form(ours, theirs, unique)), kind="closed form"
        ),
        DrawnLine(
            "law printed in\narXiv 2507.15857",
            list(unique),
            list(published_critical(unique)),
            kind="published",
        ),
    ]
    if not np.isfinite(flops).any():
        remark = "at no budget near those of the study do the two laws cross"
        return critical_chart(lines[:1], remark=remark)
    reached = unique[line.supported]
    remark = f"The laws are those of `{ours.arm}` and `{theirs.arm}`. " + (
        "The data reach the crossing at " + ", ".join(quantity(u) for u in reached) + " tokens."
        if len(reached)
        else "At no budget do the data reach the crossing: all of the line is extrapolated."
    )
    return critical_chart(
        lines,
        pair=(ours.family, theirs.family),
        support=(min(budgets), max(budgets)),
        likelihood=ours.likelihood,
        remark=remark,
    )
