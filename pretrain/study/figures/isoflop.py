"""IsoFLOP curves: loss against model size at equal compute, with the optimum of each budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pretrain.study.figures.chart import Axis, Chart, Drawn, Omitted, Panel, Series
from pretrain.study.figures.style import family_look, power

NAME, TITLE = "isoflop", "IsoFLOP curves and compute-optimal sizes"
SHADES = ("#0b3c5d", "#1d6fa5", "#2a9d8f", "#8ab17d", "#e9a03b", "#d1603d", "#8d1f3c")
"""Colours of budgets, from little compute to much."""
MAX_CURVES = 6


@dataclass(frozen=True)
class IsoFlopCurve:
    """Losses of several sizes at one compute, and the parabola through them."""

    flops: float
    params: Sequence[float]
    losses: Sequence[float]
    coefficients: tuple[float, float, float] | None
    """Of (ln N)^2, ln N and 1; None where no parabola with an interior minimum was found."""
    best_params: float = float("nan")
    low: float = float("nan")
    """Lower end of the interval of `best_params`."""
    high: float = float("nan")

    def predicted(self, params: np.ndarray) -> np.ndarray:
        """Loss of the parabola."""
        assert self.coefficients is not None
        return np.polyval(self.coefficients, np.log(params))


@dataclass(frozen=True)
class IsoFlopStudy:
    """IsoFLOP curves of one family and the power law through their optima."""

    label: str
    family: str
    curves: tuple[IsoFlopCurve, ...]
    exponent: float = float("nan")
    """Of N_opt = factor C^exponent."""
    factor: float = float("nan")
    exponent_error: float = float("nan")
    likelihood: str = "exact"
    interval: str = ""
    """Meaning of the intervals of optima, empty where there are none."""


def isoflop_chart(studies: Sequence[IsoFlopStudy]) -> Drawn:
    """Chart with one panel of curves for each family, and one of all optima."""
    usable = [s for s in studies if any(c.coefficients is not None for c in s.curves)]
    if not usable:
        reason = (
            "no compute was spent on three or more sizes with the lowest loss between them; a "
            "parabola needs that"
        )
        return Omitted(NAME, TITLE, reason)
    panels = [_curves(study) for study in usable]
    if any(_optima(study) for study in usable):
        panels.append(_all_optima(usable))
    return Chart(
        name=NAME,
        title=TITLE,
        caption=_caption(usable),
        panels=tuple(panels),
        columns=2,
        labels="starts",
        panel_size=(5.8, 4.3),
    )


def _curves(study: IsoFlopStudy) -> Panel:
    family = family_look(study.family)
    curves = sorted(study.curves, key=lambda c: c.flops)
    keep = np.unique(np.linspace(0, len(curves) - 1, min(len(curves), MAX_CURVES)).round())
    shown = [curves[int(at)] for at in keep]
    shades = np.linspace(0, len(SHADES) - 1, len(shown)).round().astype(int)
    series = []
    for curve, shade in zip(shown, shades, strict=True):
        order = np.argsort(curve.params)
        x, y = np.asarray(curve.params)[order], np.asarray(curve.losses)[order]
        color, name = SHADES[shade], f"{power(curve.flops)} FLOPs"
        series.append(Series(name, x, y, color=color, marker=family.marker, line="", filled=False))
        if curve.coefficients is None:
            continue
        grid = np.geomspace(x[0], x[-1], 60)
        fit = f"{name}, parabola"
        series.append(
            Series(fit, grid, curve.predicted(grid), color=color, marker="", shown=False, width=1.2)
        )
        best = np.array([curve.best_params])
        series.append(
            Series(
                f"{name}, optimum", best, curve.predicted(best), color=color, marker="*", line="",
                shown=False,
            )
        )  # fmt: skip
    sizes = [size for curve in shown for size in curve.params]
    low, high = min(sizes), max(sizes)
    limits = (low * (low / high) ** 0.3, high * 1.2)  # room for the names at the left
    return Panel(
        study.label,
        Axis("params", "parameters N, embeddings included", True, limits),
        Axis("loss", "loss (nats per token)"),
        tuple(series),
        label_starts=True,
    )


def _optima(study: IsoFlopStudy) -> list[IsoFlopCurve]:
    found = [curve for curve in study.curves if curve.coefficients is not None]
    return sorted(found, key=lambda c: c.flops)


def _all_optima(studies: Sequence[IsoFlopStudy]) -> Panel:
    series = []
    for study in studies:
        look, found = family_look(study.family), _optima(study)
        x = np.array([curve.flops for curve in found])
        y = np.array([curve.best_params for curve in found])
        law = np.isfinite(study.exponent) and np.isfinite(study.factor)
        error = f" ± {2 * study.exponent_error:.2g}" if np.isfinite(study.exponent_error) else ""
        label = f"{study.label}\nN ∝ C^{study.exponent:.3g}{error}" if law else study.label
        bars = bool(study.interval)
        series.append(
            Series(
                label, x, y,
                low=[curve.low for curve in found] if bars else None,
                high=[curve.high for curve in found] if bars else None,
                color=look.color, marker=look.marker, line="",
            )
        )  # fmt: skip
        if law:
            grid = np.geomspace(x.min(), x.max(), 40)
            power_law = study.factor * grid**study.exponent
            name = f"{study.label}, power law"
            series.append(
                Series(name, grid, power_law, color=look.color, marker="", line="--", shown=False)
            )
    return Panel(
        "compute-optimal size",
        Axis("flops", "training FLOPs C = 6 N D", log=True),
        Axis("params", "optimal parameters", log=True),
        tuple(series),
    )


def _caption(studies: Sequence[IsoFlopStudy]) -> str:
    points = sum(len(c.params) for s in studies for c in s.curves)
    failed = sum(c.coefficients is None for s in studies for c in s.curves)
    parts = [
        f"Loss of {points} runs against model size, at equal compute C = 6 N D. Lines are "
        "parabolas in ln N, stars their minima. The last panel has the minima against compute, "
        "with a power law (dashed)."
    ]
    for study in studies:
        kind = "exact likelihood" if study.likelihood == "exact" else "upper bound"
        text = f"{study.label}: {kind}, {len(_optima(study))} optima"
        if np.isfinite(study.exponent):
            text += f", N = {study.factor:.3g} C^{study.exponent:.3g}"
        parts.append(text + ".")
    intervals = sorted({study.interval for study in studies if study.interval})
    parts += intervals or ["Errors of the optima are not known."]
    if failed:
        parts.append(f"{failed} budgets without an interior minimum are left out of the optima.")
    if any(len(study.curves) > MAX_CURVES for study in studies):
        parts.append(f"At most {MAX_CURVES} curves a panel are drawn; all optima are.")
    parts.append(
        "The exponent depends on the window of sizes: the power law holds inside the range of "
        "compute shown and for this recipe only."
    )
    return " ".join(parts)
