"""Tables of the report: outcome of each arm, trends of gaps, fits with their intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from pretrain.study.early_stopping import Outcome, gaps, trend
from pretrain.study.figures.style import power, quantity
from pretrain.study.fits.bootstrap import interval
from pretrain.study.report.html import bullets, paragraph, table, with_error
from pretrain.study.report.laws import ArmFit, Laws
from pretrain.study.report.selection import selection_table

LEVEL = 0.9
"""Share of the resamples inside an interval."""


def outcome_table(found: Sequence[Outcome], reference: str | None) -> str:
    """Best and last evaluation of each arm at each budget, with its gap to the reference."""
    every = gaps(found, reference) if reference else []
    gap_of = {(gap.arm, gap.unique_tokens): gap for gap in every}
    rows = []
    for item in found:
        gap = gap_of.get((item.arm, item.unique_tokens))
        rows.append(
            (
                quantity(item.unique_tokens),
                item.arm,
                item.likelihood,
                quantity(item.best.params),
                item.best.setting or "one",
                with_error(item.best.loss, item.best.error),
                f"{item.best.epochs:.3g}",
                power(item.best.flops),
                with_error(item.final.loss, item.final.error),
                f"{item.final.epochs:.3g}" + ("" if item.finished else " (unfinished)"),
                _turn(item),
                "reference"
                if item.arm == reference
                else "none"
                if gap is None
                else with_error(gap.gap, gap.error),
                item.best.seeds,
            )
        )
    headers = (
        "unique tokens", "arm", "likelihood", "parameters", "best setting", "best loss",
        "at epoch", "at FLOPs", "last loss", "at epoch", "overfits after the best",
        "gap to reference", "seeds",
    )  # fmt: skip
    caption = (
        "Early stopping keeps the best evaluation; the last one is of the same size and setting. "
        "An arm with several settings has the lowest loss of all: a search that is wider finds a "
        "slightly lower one. Losses in nats per token. ± is twice the standard error of noise "
        "draws and seeds; no ± means an exact likelihood of one seed, whose variation from run to "
        "run is not known; ? means that the error is unknown."
    )
    return table(headers, rows, caption)


def _turn(item: Outcome) -> str:
    """Verdict on overfitting; the rise must exceed twice its error."""
    if item.final.epochs <= item.best.epochs:
        return "no: still falling"
    rise = with_error(
        item.final.loss - item.best.loss, math.hypot(item.final.error, item.best.error)
    )
    return f"yes: +{rise}" if item.overfits else f"within error: +{rise}"


def trend_table(found: Sequence[Outcome], reference: str | None) -> str:
    """Slope of the gap of each arm over the unique tokens."""
    if reference is None:
        return paragraph("No autoregressive arm, hence no gap.", "omitted")
    every = gaps(found, reference)
    rows = []
    for arm in dict.fromkeys(gap.arm for gap in every):
        part = [gap for gap in every if gap.arm == arm]
        line = trend(part)
        slope = "one budget: no trend" if line is None else with_error(line.slope, line.error)
        rows.append((arm, len(part), slope))
    if not rows:
        return paragraph("No arm shares a unique budget with the reference.", "omitted")
    caption = (
        f"Reference: {reference}. The slope is in nats per token for ten times more unique tokens; "
        "± is twice its standard error. It describes the budgets that were run, and no others."
    )
    return table(("arm", "budgets", "slope of the gap"), rows, caption)


def fit_tables(laws: Laws) -> str:
    """Comparison of the laws, coefficients of every fit, reasons for those that are missing."""
    if not laws.fits:
        parts = [paragraph("No law was fitted.", "omitted")]
    else:
        parts = [selection_table(laws.selections), *(_one_fit(item) for item in laws.fits)]
    if laws.missing:
        parts.append(paragraph("Arms without a data-constrained law:"))
        parts.append(bullets(laws.missing))
    return "".join(parts)


def _one_fit(item: ArmFit) -> str:
    fitted = item.fitted
    rows = []
    for name, value in fitted.values.items():
        samples = fitted.resamples.get(name)
        ends = "not computed"
        if samples is not None and len(samples):
            low, high = interval(np.asarray(samples, float), LEVEL)
            ends = f"{float(low):.4g} to {float(high):.4g}"
        rows.append((name, f"{value:.4g}", ends))
    count = max((len(values) for values in fitted.resamples.values()), default=0)
    quality = ", ".join(
        f"{name} {float(fitted.diagnostics[name]):.4g}"
        for name in ("points", "clusters", "r2", "objective", "scatter", "trend", "aic", "bic")
        if name in fitted.diagnostics
    )
    caption = (
        f"{fitted.arm or fitted.family}: {fitted.law_name.replace('_', ' ')} law"
        f"{' (chosen)' if item.chosen else ''}, "
        f"{'exact likelihood' if fitted.likelihood == 'exact' else 'upper bound'}; {quality}. "
    )
    caption += (
        f"Intervals hold {100 * LEVEL:.0f} % of {count} resamples of configurations. Single "
        "coefficients trade off against each other: compare predictions, not these."
        if count
        else "No resamples."
    )
    return table(("coefficient", "value", "interval"), rows, caption) + bullets(
        f"warning: {text}" for text in fitted.warnings
    )
