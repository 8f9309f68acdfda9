"""Charts as plain data: panels of series, drawn alike by matplotlib and plotly.

The numbers of a chart exist once. The picture, the interactive page and the CSV are made from them,
so that none can show what another does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

Numbers = Sequence[float] | np.ndarray
"""Values of points."""


@dataclass(frozen=True)
class Axis:
    """Quantity along one side of a panel."""

    name: str
    """Column in the CSV, e.g. `flops`."""
    label: str
    """Text at the axis, with the unit."""
    log: bool = False
    limits: tuple[float, float] | None = None
    """Smallest and largest value shown; None fits the data."""


@dataclass(frozen=True)
class Series:
    """Points, a line through them, and their uncertainty."""

    label: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    """Lower ends of error bars or of a band."""
    high: Numbers | None = None
    uncertainty: Literal["bars", "band"] = "bars"
    color: str = "#444444"
    marker: Literal["o", "s", "^", "D", "v", "*", "x", ""] = "o"
    line: Literal["-", "--", ":", ""] = "-"
    filled: bool = True
    width: float = 1.6
    size: float = 4.5
    shown: bool = True
    """Whether the legend or a label at its end names the series."""
    steps: bool = False
    """Draws a value that holds until the next point, not a line between them."""
    level: Numbers | None = None
    """Third quantity of the points, coloured on the scale of the panel's surface."""


@dataclass(frozen=True)
class Surface:
    """Smooth function of x and y, drawn by its level lines."""

    label: str
    x: Numbers
    y: Numbers
    z: np.ndarray
    """Values [len(y), len(x)]."""
    name: str
    """Column of z in the CSV."""
    text: str
    """Name of z with its unit."""


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    series: tuple[Series, ...] = ()
    surface: Surface | None = None
    shaded: tuple[tuple[float, float, str], ...] = ()
    """Ranges of x in grey, with what they mean."""
    level_line: tuple[float, str] | None = None
    """Horizontal reference line and its name."""
    label_starts: bool = False
    """Names series at their first points where the chart's labels are `starts`."""


@dataclass(frozen=True)
class Chart:
    """Figure with its caption."""

    name: str
    """Stem of its files."""
    title: str
    caption: str
    """Quantities, number of points, errors, kind of likelihood, and what may not be concluded."""
    panels: tuple[Panel, ...]
    columns: int = 2
    """Panels a row."""
    share_y: bool = False
    labels: Literal["ends", "starts", "legend"] = "ends"
    """Place of the names: right of the panel, left of the first points, below all panels."""
    panel_size: tuple[float, float] = (5.2, 3.9)
    """Width and height of a panel in inches."""

    def frame(self) -> pd.DataFrame:
        """Every number shown, one row a point: panel, series, x, y, ends of the uncertainty."""
        parts = [_rows(panel, item) for panel in self.panels for item in panel.series]
        parts += [_grid(panel, panel.surface) for panel in self.panels if panel.surface]
        parts += [_reference(panel) for panel in self.panels if panel.level_line]
        if not parts:
            return pd.DataFrame(columns=["panel", "series"])
        return pd.concat(parts, ignore_index=True)


@dataclass(frozen=True)
class Omitted:
    """Figure that the data do not support."""

    name: str
    title: str
    reason: str


Drawn = Chart | Omitted


@dataclass(frozen=True)
class Written:
    """Chart with its files."""

    chart: Chart
    files: dict[str, Any] = field(default_factory=dict)
    """Paths by kind: `png`, `svg`, `csv`."""


def _rows(panel: Panel, item: Series) -> pd.DataFrame:
    rows: dict[str, Any] = {
        "panel": panel.title,
        "series": item.label,
        panel.x.name: np.asarray(item.x, float),
        panel.y.name: np.asarray(item.y, float),
    }
    if item.low is not None and item.high is not None:
        rows[f"{panel.y.name}_low"] = np.asarray(item.low, float)
        rows[f"{panel.y.name}_high"] = np.asarray(item.high, float)
    if item.level is not None:
        name = panel.surface.name if panel.surface else "level"
        rows[name] = np.asarray(item.level, float)
    return pd.DataFrame(rows)


def _grid(panel: Panel, surface: Surface) -> pd.DataFrame:
    x, y = np.meshgrid(np.asarray(surface.x, float), np.asarray(surface.y, float))
    return pd.DataFrame(
        {
            "panel": panel.title,
            "series": surface.label,
            panel.x.name: x.ravel(),
            panel.y.name: y.ravel(),
            surface.name: np.asarray(surface.z, float).ravel(),
        }
    )


def _reference(panel: Panel) -> pd.DataFrame:
    assert panel.level_line is not None
    value, text = panel.level_line
    return pd.DataFrame({"panel": [panel.title], "series": [text], panel.y.name: [value]})
