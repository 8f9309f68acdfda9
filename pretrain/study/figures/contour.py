"""Contours of a data-constrained law over size and epochs, with the measured losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series, Surface
from pretrain.study.figures.style import quantity
from pretrain.study.fits.fitted import Fitted

NAME, TITLE = "contour", "Contours of the data-constrained law"
GRID = 41


@dataclass(frozen=True)
class Measured:
    """Losses at one unique budget that the contour is compared with."""

    params: Sequence[float]
    epochs: Sequence[float]
    losses: Sequence[float]


def measured_of(rows: pd.DataFrame) -> Measured:
    """Ends of schedules of a table's rows of one family and budget."""
    ends = rows[rows["final"].fillna(False).astype(bool)]
    return Measured(ends["params"].to_list(), ends["epochs"].to_list(), ends["loss"].to_list())


def contour_chart(
    laws: Sequence[tuple[Fitted, Measured]], unique_tokens: float, name: str = NAME
) -> Drawn:
    """Chart with one panel a law, in the range of its measured sizes and epochs."""
    usable = [(fit, seen) for fit, seen in laws if _spans(seen)]
    if not usable:
        reason = (
            "a contour needs a fitted law and ends of schedules of two or more sizes and two or "
            "more numbers of epochs at one unique budget"
        )
        return Omitted(name, TITLE, reason)
    panels = tuple(_panel(fit, seen, unique_tokens) for fit, seen in usable)
    caption = _caption(usable, unique_tokens)
    return Chart(name, TITLE, caption, panels, labels="legend", panel_size=(5.6, 4.4))


def _spans(seen: Measured) -> bool:
    return len(set(seen.params)) > 1 and len(set(seen.epochs)) > 1


def _panel(fit: Fitted, seen: Measured, unique: float) -> Panel:
    params = np.geomspace(min(seen.params), max(seen.params), GRID)
    epochs = np.geomspace(min(seen.epochs), max(seen.epochs), GRID)
    losses = fit.loss(params[None, :], unique * epochs[:, None], unique)
    path = _path(fit, params, epochs, unique)
    best = int(np.argmin(seen.losses))
    color = "#111827"
    series = (
        Series(
            "measured", seen.params, seen.epochs, color=color, marker="o", line="", size=4,
            shown=False, level=seen.losses,
        ),
        Series("best size for each compute C = 6 N D (law)", *path, color="#d1603d", marker=""),
        Series(
            "lowest measured loss", [seen.params[best]], [seen.epochs[best]], color="#d1603d",
            marker="*", line="", level=[seen.losses[best]],
        ),
    )  # fmt: skip
    surface = Surface("law", params, epochs, losses, "loss", "loss (nats per token)")
    label = fit.arm or fit.family
    title = f"{label}, U = {quantity(unique)}: lowest measured {seen.losses[best]:.2f}"
    pad = 1.12
    x = Axis(
        "params", "parameters N, embeddings included", True, (params[0] / pad, params[-1] * pad)
    )
    y = Axis("epochs", "epochs over the unique tokens", True, (epochs[0] / pad, epochs[-1] * pad))
    return Panel(title, x, y, series, surface=surface)


def _path(
    fit: Fitted, params: np.ndarray, epochs: np.ndarray, unique: float
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes and epochs of the lowest loss for a series of compute, inside the panel."""
    per_epoch = 6 * unique
    fine = np.geomspace(params[0], params[-1], 400)
    found: list[tuple[float, float]] = []
    for flops in np.geomspace(
        per_epoch * params[0] * epochs[0], per_epoch * params[-1] * epochs[-1], 80
    ):
        passes = flops / per_epoch / fine
        inside = (passes >= epochs[0]) & (passes <= epochs[-1])
        if inside.any():
            losses = np.where(inside, fit.loss(fine, passes * unique, unique), np.inf)
            at = int(np.argmin(losses))
            at_edge = at == int(np.argmax(inside)) or at == len(fine) - 1 - int(
                np.argmax(inside[::-1])
            )
            if not at_edge:
                found.append((float(fine[at]), float(passes[at])))
    if not found:
        return np.array([]), np.array([])
    return np.array([p for p, _ in found]), np.array([e for _, e in found])


def _caption(laws: Sequence[tuple[Fitted, Measured]], unique: float) -> str:
    parts = [
        f"Level lines: loss predicted by the fitted law at {quantity(unique)} unique tokens, in "
        "nats per token. Points: measured losses at the ends of schedules, on the same colour "
        "scale, so that a point that stands out from its surroundings is a residual. A star marks "
        "the lowest measured one."
    ]
    for fit, seen in laws:
        kind = "exact likelihood" if fit.likelihood == "exact" else "upper bound"
        predicted = fit.loss(np.asarray(seen.params), unique * np.asarray(seen.epochs), unique)
        rms = float(np.sqrt(np.mean((np.asarray(seen.losses) - predicted) ** 2)))
        parts.append(
            f"{fit.arm or fit.family}: {kind}, {fit.law_name.replace('_', ' ')} law, "
            f"n = {len(seen.losses)} points here, rms distance {rms:.3f} nats."
        )
    if all(fit.law.name == "data_constrained" for fit, _ in laws):
        parts.append("This law falls with every epoch: it cannot show overfitting.")
    parts.append("Nothing is known outside the measured range, which is all that is drawn.")
    return " ".join(parts)
