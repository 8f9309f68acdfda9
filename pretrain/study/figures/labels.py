"""Names beside the lines that they name, where no two of them overlap."""

from __future__ import annotations

import math
from typing import Any

from pretrain.study.figures.chart import Panel, Series
from pretrain.study.figures.style import SMALLEST_FONT, spread


def label_ends(figure: Any, axis: Any, panel: Panel) -> None:
    """Name each shown series at the right of the panel, with a thin line from its last point."""
    shown = [item for item in panel.series if item.shown and item.label]
    lasts = {item.label: _last(item) for item in shown}
    named = [item for item in shown if lasts[item.label] is not None]
    if not named:
        return
    figure.canvas.draw()
    height = axis.get_window_extent().height
    inverse = axis.transAxes.inverted()
    ends = [inverse.transform(axis.transData.transform(lasts[item.label])) for item in named]
    lines = [item.label.count("\n") + 1 for item in named]
    gap = max(lines) * 1.35 * SMALLEST_FONT * figure.dpi / 72 / height
    places = spread([float(end[1]) for end in ends], gap, 0.02, 0.98)
    for item, end, place in zip(named, ends, places, strict=True):
        axis.annotate(
            item.label,
            (min(float(end[0]), 1.0), float(end[1])),
            xycoords="axes fraction",
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            fontsize=SMALLEST_FONT,
            color=item.color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": item.color, "linewidth": 0.6, "alpha": 0.6},
        )


def _last(item: Series) -> tuple[float, float] | None:
    """Last point of a series that can be drawn; lines may break before their end."""
    points = [(float(x), float(y)) for x, y in zip(item.x, item.y, strict=True)]
    return next((p for p in reversed(points) if math.isfinite(p[0]) and math.isfinite(p[1])), None)


def label_starts(axis: Any, panel: Panel) -> None:
    """Name each shown series at the left of its first point, for curves that start apart."""
    for item in panel.series:
        if item.shown and item.label and len(item.x):
            axis.annotate(
                item.label,
                (item.x[0], item.y[0]),
                xytext=(-7, 0),
                textcoords="offset points",
                ha="right",
                va="center",
                fontsize=SMALLEST_FONT,
                color=item.color,
            )
