"""Compute-optimal size without a law: Hoffmann's approaches 1 and 2 (arXiv 2203.15556).

Approach 1 takes the envelope of training curves, approach 2 the minimum of a parabola of loss in
ln N for each compute budget. Both end in power laws of compute.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import linregress

from pretrain.errors import ConfigError

WINDOWS = (float("inf"), 0.5, 0.25, 0.1)
"""Distances from the lowest loss, in nats, of the parabolas that are compared."""


@dataclass(frozen=True)
class PowerLaw:
    """coefficient * C^exponent, C in FLOPs."""

    coefficient: float
    exponent: float
    error: float
    """Standard error of the exponent by regression; NaN for two budgets."""

    def __call__(self, flops: float) -> float:
        """Value at a compute budget."""
        return self.coefficient * flops**self.exponent


@dataclass(frozen=True)
class Optima:
    """Compute-optimal sizes of several budgets, and their power laws."""

    budgets: pd.DataFrame
    """Columns `flops`, `params`, `tokens`, `loss`, `points`: one row for each budget."""
    params: PowerLaw
    tokens: PowerLaw
    windows: pd.DataFrame
    """Approach 2 with other windows: `window` in nats, `exponent`, `coefficient`, `budgets`."""
    warnings: tuple[str, ...]


def envelope(curves: pd.DataFrame, *, points: int = 200) -> Optima:
    """Approach 1: size of the run with the lowest loss at each compute, then power laws.

    The loss along a curve is interpolated in log compute. Smooth training losses first, or give
    validation losses.

    Args:
        curves: Columns `run`, `params`, `flops`, `loss`: several evaluations of each run.
        points: Number of computes, evenly spaced in the logarithm.
    """
    grid = np.geomspace(curves["flops"].min(), curves["flops"].max(), points)
    sizes, losses = [], []
    for _, curve in curves.groupby("run"):
        curve = curve.sort_values("flops")
        at = np.interp(
            np.log(grid), np.log(curve["flops"]), curve["loss"], left=np.inf, right=np.inf
        )
        losses.append(at)
        sizes.append(float(curve["params"].iloc[0]))
    stacked, params = np.stack(losses), np.array(sizes)
    # At its ends the envelope has few competitors: an optimum lies between two sizes.
    several = np.isfinite(stacked).sum(axis=0) >= 3
    best = stacked.argmin(axis=0)
    chosen = params[best]
    inside = several & (chosen > params.min()) & (chosen < params.max())
    if inside.sum() < 2:
        raise ConfigError(
            "the envelope has no compute whose best run is between a smaller and a larger one; "
            "give curves of more sizes"
        )
    budgets = pd.DataFrame(
        {
            "flops": grid[inside],
            "params": chosen[inside],
            "tokens": grid[inside] / (6 * chosen[inside]),
            "loss": stacked.min(axis=0)[inside],
            "points": np.isfinite(stacked).sum(axis=0)[inside],
        }
    )
    warnings = [
        "points of a running curve have a schedule that was made for a longer run: approach 1 "
        "favours small models"
    ]
    if budgets["params"].nunique() < 3:
        warnings.append(f"only {budgets['params'].nunique()} sizes are on the envelope")
    windows = pd.DataFrame(columns=["window", "exponent", "coefficient", "budgets"])
    return Optima(budgets, *_power_laws(budgets), windows, tuple(warnings))


def parabolas(
    table: pd.DataFrame, *, window: float = float("inf"), tolerance: float = 0.02
) -> Optima:
    """Approach 2: minimum of a parabola of loss in ln N at each budget, then power laws.

    A budget counts only where the parabola opens upwards and its minimum lies between the sizes.

    Args:
        table: Columns `flops`, `params`, `loss`; each run trained with a schedule for its budget.
        window: Only points within that many nats of the lowest loss of their budget are used.
        tolerance: Relative difference up to which two computes are one budget.

    Raises:
        ConfigError: Fewer than two budgets have an interior minimum.
    """
    warnings: list[str] = []
    budgets = _minima(table, window, tolerance, warnings)
    if len(budgets) < 2:
        raise ConfigError(
            "approach 2 needs two budgets with a minimum inside their sizes: " + "; ".join(warnings)
        )
    if len(budgets) < 4:
        warnings.append(f"only {len(budgets)} budgets: the exponents rest on them")
    rows = []
    for width in WINDOWS:
        found = _minima(table, width, tolerance, [])
        if len(found) >= 2:
            law, _ = _power_laws(found)
            rows.append((width, law.exponent, law.coefficient, len(found)))
    windows = pd.DataFrame(rows, columns=["window", "exponent", "coefficient", "budgets"])
    spread = float(np.ptp(windows["exponent"])) if len(windows) else 0.0
    if spread > 0.01:
        warnings.append(f"the exponent of N moves by {spread:.3f} with the window of the parabola")
    return Optima(budgets, *_power_laws(budgets), windows, tuple(warnings))


def _minima(
    table: pd.DataFrame, window: float, tolerance: float, warnings: list[str]
) -> pd.DataFrame:
    """Interior minimum of each budget's parabola; reasons of those without one."""
    rows = []
    for flops, group in _budgets(table, tolerance):
        near = group[group["loss"] <= group["loss"].min() + window]
        if near["params"].nunique() < 4:
            warnings.append(f"budget {flops:.2g}: only {near['params'].nunique()} sizes")
            continue
        x = np.log(near["params"].to_numpy(float))
        curvature, slope, constant = np.polyfit(x - x.mean(), near["loss"].to_numpy(float), 2)
        if curvature <= 0:
            warnings.append(f"budget {flops:.2g}: the parabola opens downwards")
            continue
        at = -slope / (2 * curvature)
        if not x.min() < at + x.mean() < x.max():
            warnings.append(f"budget {flops:.2g}: the minimum lies outside the sizes")
            continue
        size = float(np.exp(at + x.mean()))
        lowest = float(constant - slope**2 / (4 * curvature))
        rows.append((flops, size, flops / (6 * size), lowest, len(near)))
    return pd.DataFrame(rows, columns=["flops", "params", "tokens", "loss", "points"])


def _budgets(table: pd.DataFrame, tolerance: float) -> Iterator[tuple[float, pd.DataFrame]]:
    """Rows of each budget: computes closer than the tolerance are one."""
    ordered = table.sort_values("flops")
    steps = np.diff(np.log(ordered["flops"].to_numpy(float)), prepend=-np.inf) > tolerance
    for _, group in ordered.groupby(np.cumsum(steps)):
        yield float(np.exp(np.log(group["flops"].to_numpy(float)).mean())), group


def _power_laws(budgets: pd.DataFrame) -> tuple[PowerLaw, PowerLaw]:
    """Power laws of N and D by regression of the logarithms."""
    return _power_law(budgets, "params"), _power_law(budgets, "tokens")


def _power_law(budgets: pd.DataFrame, name: str) -> PowerLaw:
    line = linregress(np.log(budgets["flops"]), np.log(budgets[name]))
    error = float(line.stderr) if len(budgets) > 2 else float("nan")
    return PowerLaw(float(np.exp(line.intercept)), float(line.slope), error)
