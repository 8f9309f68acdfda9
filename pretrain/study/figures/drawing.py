"""Charts as PNG and SVG through matplotlib, with their numbers as CSV.

The same chart gives the same files: no date and no random identifier is written.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from pretrain.study.figures.chart import Axis, Chart, Panel, Series, Surface, Written
from pretrain.study.figures.labels import label_ends, label_starts
from pretrain.study.figures.style import RC, SMALLEST_FONT, log_ticks, power, quantity

LINES = {"-": "solid", "--": (0, (4, 2)), ":": (0, (1, 1.5)), "": "none"}


def write_chart(chart: Chart, folder: Path) -> Written:
    """Write `FOLDER/NAME.png`, `.svg` and `.csv`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    files = {kind: folder / f"{chart.name}.{kind}" for kind in ("png", "svg", "csv")}
    with plt.rc_context(RC):
        figure = _draw(chart, plt)
        figure.savefig(files["png"], dpi=150, metadata={"Software": None})
        figure.savefig(files["svg"], metadata={"Date": None, "Creator": None})
        plt.close(figure)
    chart.frame().to_csv(files["csv"], index=False, float_format="%.8g", lineterminator="\n")
    return Written(chart, files)


def _draw(chart: Chart, plt: Any) -> Any:
    columns = min(chart.columns, len(chart.panels))
    rows = math.ceil(len(chart.panels) / columns)
    width, height = chart.panel_size
    figure, grid = plt.subplots(
        rows,
        columns,
        figsize=(width * columns, height * rows + (0.4 if chart.labels == "legend" else 0)),
        squeeze=False,
        sharey="row" if chart.share_y else False,
        layout="constrained",
    )
    axes = list(grid.ravel())
    for axis in axes[len(chart.panels) :]:
        axis.remove()
    for axis, panel in zip(axes, chart.panels, strict=False):
        _draw_panel(axis, panel)
    for at, (axis, panel) in enumerate(zip(axes, chart.panels, strict=False)):
        _ticks(axis.xaxis, panel.x, axis.get_xlim())
        _ticks(axis.yaxis, panel.y, axis.get_ylim())
        if at % columns and panel.y.label == chart.panels[at - 1].y.label:
            axis.set_ylabel("")
        if chart.labels == "ends" or (chart.labels == "starts" and not panel.label_starts):
            label_ends(figure, axis, panel)
        elif chart.labels == "starts":
            label_starts(axis, panel)
    if chart.labels == "legend":
        _legend(figure, axes, chart, columns)
    return figure


def _draw_panel(axis: Any, panel: Panel) -> None:
    axis.set_xscale("log" if panel.x.log else "linear")
    axis.set_yscale("log" if panel.y.log else "linear")
    for low, high, text in panel.shaded:
        axis.axvspan(low, high, color="#eceef1", linewidth=0, zorder=0)
        axis.annotate(
            text,
            ((low * high) ** 0.5 if panel.x.log else (low + high) / 2, 0.99),
            xycoords=("data", "axes fraction"),
            ha="center",
            va="top",
            fontsize=SMALLEST_FONT,
            color="#4b5563",
        )
    if panel.surface is not None:
        _draw_surface(axis, panel.surface, panel)
    for item in panel.series:
        _draw_series(axis, item, panel)
    if panel.level_line is not None:
        value, text = panel.level_line
        axis.axhline(value, color="#6b7280", linestyle=":", linewidth=1)
        axis.annotate(
            text,
            (0.01, value),
            xycoords=("axes fraction", "data"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left",
            va="bottom",
            fontsize=SMALLEST_FONT,
            color="#4b5563",
        )
    axis.grid(alpha=0.25, which="major", linewidth=0.5)
    axis.set_title(panel.title, loc="left")
    axis.set_xlabel(panel.x.label)
    axis.set_ylabel(panel.y.label)
    if panel.x.limits:
        axis.set_xlim(*panel.x.limits)
    if panel.y.limits:
        axis.set_ylim(*panel.y.limits)


def _draw_series(axis: Any, item: Series, panel: Panel) -> None:
    x, y = np.asarray(item.x, float), np.asarray(item.y, float)
    style: dict[str, Any] = {
        "color": item.color,
        "drawstyle": "steps-post" if item.steps else "default",
        "linestyle": LINES[item.line],
        "linewidth": item.width,
        "marker": item.marker or None,
        "markersize": item.size * (2.6 if item.marker == "*" else 1),
        "markerfacecolor": item.color if item.filled else "white",
        "markeredgecolor": "white" if item.marker == "*" else item.color,
        "markeredgewidth": 0.8 if item.marker == "*" else 1.1,
    }
    name = item.label if item.shown else f"_{item.label}"
    style["clip_on"] = item.marker != "*"  # a best point may lie in a corner
    zorder = 4 if item.marker == "*" else 3
    if item.low is None or item.high is None:
        (line,) = axis.plot(x, y, label=name, zorder=zorder, **style)
        line.set_in_layout(item.marker != "*")  # unclipped stars must not shrink the panels
    elif item.uncertainty == "band":
        axis.fill_between(x, item.low, item.high, color=item.color, alpha=0.18, linewidth=0)
        axis.plot(x, y, label=name, zorder=zorder, **style)
    else:
        low, high = np.asarray(item.low, float), np.asarray(item.high, float)
        ends = np.nan_to_num(np.clip(np.stack([y - low, high - y]), 0, None))
        axis.errorbar(
            x, y, yerr=ends, label=name, zorder=zorder, capsize=2.5, elinewidth=1, **style
        )
    if item.level is not None and panel.surface is not None:
        low_z, high_z = float(np.nanmin(panel.surface.z)), float(np.nanmax(panel.surface.z))
        axis.scatter(
            x, y, c=item.level, cmap="cividis", vmin=low_z, vmax=high_z, s=26, zorder=5,
            edgecolors="white", linewidths=0.8,
        )  # fmt: skip


def _draw_surface(axis: Any, surface: Surface, panel: Panel) -> None:
    levels = surface_levels(surface.z)
    low, high = float(np.nanmin(surface.z)), float(np.nanmax(surface.z))
    axis.contourf(
        surface.x, surface.y, surface.z, levels=levels, cmap="cividis", vmin=low, vmax=high,
        extend="both", alpha=0.85,
    )  # fmt: skip
    lines = axis.contour(
        surface.x, surface.y, surface.z, levels=levels, colors="white", linewidths=0.8
    )
    texts = axis.clabel(lines, fmt="%g", fontsize=SMALLEST_FONT, colors="black")
    for text in texts:
        text.set_bbox({"boxstyle": "round,pad=0.15", "fc": "white", "ec": "none", "alpha": 0.8})


def surface_levels(z: np.ndarray, count: int = 9) -> list[float]:
    """Round levels, denser near the minimum, where optima lie."""
    low, high = float(np.nanmin(z)), float(np.nanmax(z))
    shares = np.linspace(0.04, 0.97, count) ** 2
    digits = max(1, 1 - math.floor(math.log10(max(high - low, 1e-9))))
    return sorted({round(low + share * (high - low), digits) for share in shares})


def _ticks(side: Any, axis: Axis, limits: tuple[float, float]) -> None:
    """Ticks of a logarithmic side as plain numbers, none of them minor."""
    if not axis.log:
        return
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    wide = axis.name.startswith(("flops", "critical"))  # powers of ten need more room
    values = log_ticks(min(limits), max(limits), 5 if wide else 7)
    text = power if wide else quantity
    side.set_major_locator(FixedLocator(values))
    side.set_major_formatter(FixedFormatter([text(value) for value in values]))
    side.set_minor_locator(NullLocator())


def _legend(figure: Any, axes: list[Any], chart: Chart, columns: int) -> None:
    """One legend below all panels, every name once, in the order of the series."""
    found: dict[str, Any] = {}
    for axis in axes[: len(chart.panels)]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(name, handle)
    order = dict.fromkeys(item.label for panel in chart.panels for item in panel.series)
    # Entries that explain signs, without points of their own, come last.
    signs = {item.label for panel in chart.panels for item in panel.series if not len(item.x)}
    names = [n for n in order if n not in signs] + [n for n in order if n in signs]
    entries = {name: found[name] for name in names if name in found}
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=_legend_columns(list(entries), chart.panel_size[0] * columns),
            frameon=False,
        )


def _legend_columns(names: list[str], width: float) -> int:
    """Entries a row that fit into `width` inches, by their longest name."""
    entry = 0.075 * max(len(name) for name in names) + 0.6
    return max(1, min(len(names), int(width / entry)))
