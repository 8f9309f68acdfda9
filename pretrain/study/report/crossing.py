"""Critical compute of a study's laws: tables of all pairs, and the figure of the best pair."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pretrain.study.closed_form import closed_form, closed_form_errors
from pretrain.study.critical import (
    Comparison,
    CriticalLine,
    compare,
    num_resamples,
    published_critical,
)
from pretrain.study.figures.chart import Drawn
from pretrain.study.figures.critical import CriticalLine as DrawnLine
from pretrain.study.figures.critical import critical_chart
from pretrain.study.figures.style import power, quantity
from pretrain.study.fits.fitted import Fitted
from pretrain.study.report.html import paragraph, table
from pretrain.study.report.observed import Observed

POINTS = 9
BEYOND = 3.0
"""Factor by which the line goes on beyond the budgets of the data."""


def crossing_tables(fits: Sequence[Fitted], budgets: Sequence[float]) -> str:
    """Critical compute of all pairs at the budgets of the study, and the lines through them."""
    found = compare(fits, budgets)
    if not found:
        text = (
            "Not computed: it needs a law of repeated data of an autoregressive arm and of another "
            "family; see the fits for what is missing."
        )
        return paragraph(text, "omitted")
    rows = [
        row for pair in found for line in pair.lines for row in _budget_rows(pair, line, budgets)
    ]
    headers = (
        "arm", "its loss", "against", "unique tokens", "critical FLOPs", "90 % interval",
        "resamples without crossing", "inside the data", "bound over exact",
        "closed form over crossing", "law printed in arXiv 2507.15857",
    )  # fmt: skip
    caption = (
        "Least compute C = 6 N D at which the law of the arm predicts a lower loss than that of "
        "the other one, both at their best size: numeric crossing of the full laws. A crossing "
        "that is measured by a bound comes late; where an arm was measured by both likelihoods, "
        "the ratio of its crossings says by how much. The printed law is for other data and "
        "another recipe."
    )
    return table(headers, rows, caption) + _slopes(found)


def _budget_rows(
    pair: Comparison, line: CriticalLine, budgets: Sequence[float]
) -> list[tuple[object, ...]]:
    """One row for each budget."""
    late, without = pair.lateness, line.share_without_crossing
    ratios = _closed_over_crossing(line, budgets)
    return [
        (
            line.challenger.arm,
            line.challenger.likelihood,
            line.reference.arm,
            quantity(unique),
            flops_text(float(line.flops[at])),
            _interval(line, at),
            f"{100 * without[at]:.0f} %" if without.size else "not computed",
            "yes" if line.supported[at] else "no: extrapolated",
            _ratio(None if late is None else late[at], "one likelihood only"),
            _ratio(None if ratios is None else ratios[at], "none for this law"),
            power(float(published_critical(unique))),
        )
        for at, unique in enumerate(budgets)
    ]


def _closed_over_crossing(line: CriticalLine, budgets: Sequence[float]) -> np.ndarray | None:
    if not _has_closed_form(line):
        return None
    errors = closed_form_errors(line.challenger, line.reference, budgets)
    return errors.loc[errors["include_entropy"], "ratio"].to_numpy(float)


def _has_closed_form(line: CriticalLine) -> bool:
    return {line.challenger.law_name, line.reference.law_name} == {"data_constrained"}


def _ratio(value: float | None, otherwise: str) -> str:
    if value is None:
        return otherwise
    return f"{value:.3g}" if np.isfinite(value) and value > 0 else "no crossing"


def _slopes(found: Sequence[Comparison]) -> str:
    """Straight lines of the crossings in log U, with the intervals of their slopes."""
    rows = []
    for pair in found:
        for line in pair.lines:
            if line.line.points < 2:
                text = interval = "fewer than two budgets with a crossing"
            else:
                ends = line.slope_interval
                text = f"C = {10**line.line.intercept:.3g} (U / 1M)^{line.line.slope:.3f}"
                interval = "not computed" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"
            doubt = line.bias or "both losses are exact"
            ours = line.challenger
            rows.append((ours.arm, ours.likelihood, line.reference.arm, text, interval, doubt))
    headers = ("arm", "its loss", "against", "line", "90 % interval of the slope", "likelihoods")
    caption = (
        "Straight lines through the crossings at the budgets of the study, in logarithms. The "
        "interval has the resamples that cross at two budgets or more, which makes it too narrow "
        "where many do not. The line printed in arXiv 2507.15857 has slope 2.174."
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


def crossing_chart(
    fits: Sequence[Fitted],
    budgets: Sequence[float],
    arms: Sequence[str],
    observed: Sequence[Observed] = (),
) -> Drawn:
    """Chart of the pair of the two arms; `arms` are the challenger and the reference."""
    ends = (min(budgets) / BEYOND, max(budgets) * BEYOND) if budgets else (1.0, 1.0)
    unique = np.unique(np.concatenate([np.geomspace(*ends, POINTS), np.asarray(budgets, float)]))
    wanted = [fit for fit in fits if fit.arm in arms]
    found = compare(wanted, list(unique)) or compare(fits, list(unique))
    if not found:
        return critical_chart(_observed_line(observed))
    lines = _drawn_lines(found[0], unique)
    first = found[0].lines[0]
    if not any((np.isfinite(line.flops) & (line.flops > 0)).any() for line in found[0].lines):
        remark = "at no budget near those of the study do the two laws cross"
        return critical_chart(lines[:1], remark=remark)
    return critical_chart(
        [*lines, *_observed_line(observed)],
        pair=(first.challenger.family, first.reference.family),
        support=(min(budgets), max(budgets)),
        likelihood=first.challenger.likelihood,
        remark=_remark(first, unique),
    )


def _drawn_lines(pair: Comparison, unique: np.ndarray) -> list[DrawnLine]:
    """Crossings by each likelihood, closed form, printed law."""
    drawn = []
    for line in pair.lines:
        band = line.band
        count = max(num_resamples(line.challenger), num_resamples(line.reference))
        several = f", {line.challenger.likelihood}" if len(pair.lines) > 1 else ""
        drawn.append(
            DrawnLine(
                f"crossing of the laws{several}",
                list(unique),
                list(np.where(line.flops > 0, line.flops, np.nan)),
                low=None if band is None else list(band[0]),
                high=None if band is None else list(band[1]),
                kind="numeric" if line is pair.lines[0] else "bound",
                band="" if band is None else f"90 % of {count} resamples of configurations",
            )
        )
    first = pair.lines[0]
    if _has_closed_form(first):
        flops = closed_form(first.challenger, first.reference, unique)
        drawn.append(DrawnLine("closed form", list(unique), list(flops), kind="closed form"))
    label, printed = "law printed in\narXiv 2507.15857", list(published_critical(unique))
    return [*drawn, DrawnLine(label, list(unique), printed, kind="published")]


def _observed_line(observed: Sequence[Observed]) -> list[DrawnLine]:
    if not observed:
        return []
    return [
        DrawnLine(
            "measured runs",
            [item.unique_tokens for item in observed],
            [item.flops for item in observed],
            low=[item.low for item in observed],
            high=[item.flops for item in observed],
            kind="observed",
        )
    ]


def _remark(line: CriticalLine, unique: np.ndarray) -> str:
    reached = unique[line.supported]
    return f"The laws are those of `{line.challenger.arm}` and `{line.reference.arm}`. " + (
        "The data reach the crossing at " + ", ".join(quantity(u) for u in reached) + " tokens."
        if len(reached)
        else "At no budget do the data reach the crossing: all of the line is extrapolated."
    )
