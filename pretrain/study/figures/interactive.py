"""Charts as interactive plotly figures for the report page."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from pretrain.study.figures.chart import Axis, Chart, Panel, Series, Surface
from pretrain.study.figures.style import log_ticks, power, quantity

SYMBOLS = {"o": "circle", "s": "square", "^": "triangle-up", "D": "diamond", "v": "triangle-down",
           "*": "star", "x": "x"}  # fmt: skip
DASHES = {"-": "solid", "--": "dash", ":": "dot"}
CIVIDIS = "Cividis"
PANEL_HEIGHT = 340
CONFIG = {"displaylogo": False, "responsive": True, "displayModeBar": False}
"""Settings of the page's figures: no link to another site."""


def figure_json(chart: Chart) -> str:
    """Traces and layout as JSON; the same chart gives the same text."""
    from plotly.subplots import make_subplots

    columns = min(chart.columns, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    figure = make_subplots(
        rows=rows,
        cols=columns,
        subplot_titles=[_html(panel.title) for panel in chart.panels],
        shared_yaxes=chart.share_y,
        horizontal_spacing=0.22 / columns if columns > 1 else 0,
        vertical_spacing=0.24 / rows if rows > 1 else 0,
    )
    named: set[str] = set()
    for at, panel in enumerate(chart.panels):
        place = {"row": at // columns + 1, "col": at % columns + 1}
        _add_panel(figure, panel, place, named)
    figure.update_layout(
        template="none",
        height=PANEL_HEIGHT * rows + 110,
        margin={"l": 60, "r": 20, "t": 40, "b": 60},
        font={"size": 12, "family": "system-ui, sans-serif"},
        legend={"orientation": "h", "yanchor": "top", "y": -0.16 / rows, "x": 0},
        hovermode="closest",
    )
    figure.update_annotations(font_size=12)
    return figure.to_json(remove_uids=True)


def _html(text: str) -> str:
    """Text with line breaks of the page; plotly escapes what is no known tag."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\n", "<br>")


def _add_panel(figure: Any, panel: Panel, place: dict[str, int], named: set[str]) -> None:
    for low, high, text in panel.shaded:
        figure.add_vrect(x0=low, x1=high, fillcolor="#eceef1", line_width=0, layer="below", **place)
        figure.add_annotation(
            x=math.log10(low * high) / 2 if panel.x.log else (low + high) / 2,
            y=1,
            yref="y domain",
            text=_html(text),
            showarrow=False,
            **place,
        )
    if panel.surface is not None:
        _add_surface(figure, panel.surface, place)
    for item in panel.series:
        _add_series(figure, item, panel, place, named)
    if panel.level_line is not None:
        value, text = panel.level_line
        figure.add_hline(
            y=value, line={"color": "#6b7280", "dash": "dot", "width": 1},
            annotation_text=_html(text), annotation_position="top right", **place,
        )  # fmt: skip
    figure.update_xaxes(**_axis(panel.x, _values(panel, "x")), **place)
    figure.update_yaxes(**_axis(panel.y, _values(panel, "y")), **place)


def _values(panel: Panel, name: str) -> np.ndarray:
    """Every value along one side of a panel."""
    parts = [np.asarray(getattr(item, name), float).ravel() for item in panel.series]
    if panel.surface is not None:
        parts.append(np.asarray(getattr(panel.surface, name), float).ravel())
    if not parts:
        return np.array([])
    values = np.concatenate(parts)
    return values[np.isfinite(values)]


def _axis(axis: Axis, values: np.ndarray) -> dict[str, Any]:
    """Settings of one side, with the ticks of the printed figure."""
    settings: dict[str, Any] = {
        "title": {"text": _html(axis.label), "standoff": 8},
        "showline": True,
        "linecolor": "#444444",
        "gridcolor": "#e5e7eb",
        "zeroline": False,
        "ticks": "outside",
    }
    if axis.log:
        settings["type"] = "log"
        positive = values[values > 0]
        ends = axis.limits or (
            (positive.min() / 1.1, positive.max() * 1.1) if len(positive) else (1, 10)
        )
        wide = axis.name.startswith(("flops", "critical"))  # powers of ten need more room
        ticks = log_ticks(ends[0], ends[1], 5 if wide else 7)
        text = power if wide else quantity
        settings |= {"tickvals": ticks, "ticktext": [text(value) for value in ticks]}
        settings["range"] = [math.log10(ends[0]), math.log10(ends[1])]
    elif axis.limits:
        settings["range"] = list(axis.limits)
    return settings


def _add_series(
    figure: Any, item: Series, panel: Panel, place: dict[str, int], named: set[str]
) -> None:
    import plotly.graph_objects as go

    label = _html(item.label)
    x, y = _plain(item.x), _plain(item.y)
    band = item.uncertainty == "band" and item.low is not None and item.high is not None
    if band:
        edges = _plain(item.high) + _plain(item.low)[::-1]
        figure.add_trace(
            go.Scatter(
                x=x + x[::-1], y=edges, fill="toself", fillcolor=_transparent(item.color),
                line={"width": 0}, hoverinfo="skip", showlegend=False, legendgroup=label,
            ),
            **place,
        )  # fmt: skip
    marker: dict[str, Any] = {
        "symbol": SYMBOLS.get(item.marker, "circle") + ("" if item.filled else "-open"),
        "size": item.size * (2.6 if item.marker == "*" else 1.6),
        "color": item.color,
    }
    if item.level is not None and panel.surface is not None and item.marker != "*":
        low, high = float(np.nanmin(panel.surface.z)), float(np.nanmax(panel.surface.z))
        marker |= {"color": _plain(item.level), "colorscale": CIVIDIS, "cmin": low, "cmax": high}
        marker["line"] = {"color": "white", "width": 1}
    mode = "+".join(
        [*(["lines"] if item.line else []), *(["markers"] if item.marker else [])]
    )  # fmt: skip
    error = None
    if item.low is not None and item.high is not None and not band:
        middle = np.asarray(item.y, float)
        error = {
            "type": "data",
            "symmetric": False,
            "array": _plain(np.clip(np.asarray(item.high, float) - middle, 0, None)),
            "arrayminus": _plain(np.clip(middle - np.asarray(item.low, float), 0, None)),
            "thickness": 1,
            "width": 3,
        }
    figure.add_trace(
        go.Scatter(
            x=x or [None],
            y=y or [None],
            name=label,
            mode=mode or "markers",
            legendgroup=label,
            showlegend=item.shown and item.label not in named,
            marker=marker if item.marker else None,
            line={
                "color": item.color, "width": item.width, "dash": DASHES.get(item.line, "solid"),
                "shape": "hv" if item.steps else "linear",
            },
            error_y=error,
            customdata=None if item.level is None else _plain(item.level),
            hovertemplate=_hover(item, panel),
        ),
        **place,
    )  # fmt: skip
    named.add(item.label)


def _hover(item: Series, panel: Panel) -> str:
    level = "" if item.level is None else "<br>loss %{customdata:.4g}"
    x = _html(panel.x.label.split("\n")[0])
    return f"{_html(item.label)}<br>%{{y:.4g}} at %{{x:.4g}} {x}{level}<extra></extra>"


def _add_surface(figure: Any, surface: Surface, place: dict[str, int]) -> None:
    import plotly.graph_objects as go

    low, high = float(np.nanmin(surface.z)), float(np.nanmax(surface.z))
    figure.add_trace(
        go.Contour(
            x=_plain(surface.x),
            y=_plain(surface.y),
            z=[_plain(row) for row in np.asarray(surface.z, float)],
            colorscale=CIVIDIS,
            zmin=low,
            zmax=high,
            ncontours=16,
            opacity=0.85,
            showscale=False,
            contours={"showlabels": True, "labelfont": {"color": "white", "size": 11}},
            line={"color": "white", "width": 0.8},
            hovertemplate=_html(surface.text) + " %{z:.4g}<extra></extra>",
            name=_html(surface.label),
        ),
        **place,
    )


def _plain(values: Any) -> list[float | None]:
    """Numbers of JSON, with as many digits as the CSV; None where there is none."""
    array = np.asarray(values, float).ravel()
    return [float(f"{value:.8g}") if math.isfinite(value) else None for value in array]


def _transparent(color: str) -> str:
    red, green, blue = (int(color[at : at + 2], 16) for at in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.18)"
