"""Residuals of fitted laws against size, epochs and unique tokens."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import Look, arm_looks
from pretrain.study.fits.fitted import Fitted

NAME, TITLE = "residuals", "Residuals of the fitted laws"
AXES = (
    Axis("params", "parameters N, embeddings included", log=True),
    Axis("epochs", "epochs over the unique tokens", log=True),
    Axis("predicted", "predicted loss (nats per token)"),
)
BINS = 6
FEW_POINTS = 12
"""Points below which no running mean is drawn."""
KEY = Series("mean of neighbours", [], [], color="#444444", marker="", width=2.2)
"""Entry of the legend alone."""


def residuals(fit: Fitted, rows: pd.DataFrame) -> pd.DataFrame:
    """Columns `params`, `epochs`, `predicted`, `measured` and `residual` in per cent of the loss.

    The residual is 100 (ln measured - ln predicted), the quantity whose Huber loss fits minimise.
    """
    predicted = fit.loss(rows["params"], rows["tokens"], rows["unique_tokens"])
    measured = rows["loss"].to_numpy(float)
    return pd.DataFrame(
        {
            "params": rows["params"].to_numpy(float),
            "epochs": rows["tokens"].to_numpy(float) / rows["unique_tokens"].to_numpy(float),
            "predicted": predicted,
            "measured": measured,
            "residual": 100 * (np.log(measured) - np.log(predicted)),
        }
    )


def residual_chart(fits: Sequence[tuple[Fitted, pd.DataFrame]], name: str = NAME) -> Drawn:
    """Chart of residuals of the rows that each law was fitted to, with running means."""
    found = [(fit, residuals(fit, rows)) for fit, rows in fits if len(rows)]
    if not found:
        return Omitted(name, TITLE, "no law was fitted")
    named = {"arm": [_label(f) for f, _ in found], "family": [f.family for f, _ in found]}
    looks = arm_looks(pd.DataFrame(named))
    panels = []
    for axis in AXES:
        series: list[Series] = []
        for fit, part in found:
            if part[axis.name].nunique() > 1 or axis.name == "predicted":
                series += _points(fit, part, axis.name, looks[_label(fit)])
        series.append(KEY)
        if len(series) > 1:
            y = Axis("residual", "100 ln(measured / predicted), about per cent")
            panels.append(
                Panel(f"over {axis.label.split(',')[0].split(' (')[0]}", axis, y, tuple(series),
                      level_line=(0.0, ""))
            )  # fmt: skip
    return Chart(
        name=name,
        title=TITLE,
        caption=_caption(found),
        panels=tuple(panels),
        columns=len(panels),
        share_y=True,
        labels="legend",
        panel_size=(4.4, 3.6),
    )


def _label(fit: Fitted) -> str:
    return fit.arm or fit.family


def _points(fit: Fitted, part: pd.DataFrame, x: str, look: Look) -> list[Series]:
    label = _label(fit)
    ordered = part.sort_values(x)
    series = [
        Series(
            label, ordered[x].to_list(), ordered["residual"].to_list(), color=look.color,
            marker=look.marker, filled=False, line="", size=3,
        )
    ]  # fmt: skip
    means = running_mean(ordered[x].to_numpy(), ordered["residual"].to_numpy())
    if means is not None:
        name = f"{label}, mean of neighbours"
        series.append(Series(name, *means, color=look.color, marker="", width=2.2, shown=False))
    return series


def running_mean(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Median x and mean y of groups: values of x where there are few, else six of equal number.

    None for few points.
    """
    values = np.unique(x)
    if len(x) < FEW_POINTS or len(values) < 3:
        return None
    if len(values) <= FEW_POINTS:
        groups = [np.flatnonzero(x == value) for value in values]
    else:
        groups = np.array_split(np.argsort(x, kind="stable"), BINS)
    return (
        np.array([np.median(x[group]) for group in groups]),
        np.array([np.mean(y[group]) for group in groups]),
    )


def _caption(found: Sequence[tuple[Fitted, pd.DataFrame]]) -> str:
    parts = [
        "Measured against predicted loss, in per cent of the loss, for the points that each law "
        "was fitted to; thick lines are means at each value, or of six groups of equally many "
        "neighbours."
    ]
    for fit, part in found:
        kind = "exact likelihood" if fit.likelihood == "exact" else "upper bound"
        inside = float(np.mean(np.abs(part["residual"]) <= 2))
        parts.append(
            f"{fit.arm or fit.family}: {fit.law_name.replace('_', ' ')} law, {kind}, "
            f"n = {len(part)}, rms {np.sqrt(np.mean(part['residual'] ** 2)):.2f} %, "
            f"{100 * inside:.0f} % within 2 %."
        )
    parts.append(
        "A mean that leaves zero systematically says that the form is wrong there. Small residuals "
        "of fitted points say nothing of predictions outside their range; the held-out "
        "errors in the table of laws do."
    )
    return " ".join(parts)
