"""Likelihood profile of one coefficient: the best objective with it held at each of many values.

A coefficient such as R_D is never reported by its best value alone: on published data a hundredfold
change of it moves the objective by half a per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import chi2

from pretrain.errors import ConfigError
from pretrain.study.fits.fit import cluster_codes, posed
from pretrain.study.fits.fitted import Fitted
from pretrain.study.fits.problem import POSSIBLE, Problem


@dataclass(frozen=True)
class Profile:
    """Objective along one coefficient, the others refitted at each value."""

    name: str
    values: np.ndarray
    """Values [v] of the coefficient, ascending."""
    objectives: np.ndarray
    """Smallest sum of Huber losses [v] at each value."""
    best: float
    """Value of the lowest objective."""
    interval: tuple[float, float]
    """Likelihood interval; 0 or infinity where the range of the profile does not bound it."""
    level: float
    """Confidence of the interval."""

    @property
    def objective_range(self) -> tuple[float, float]:
        """Smallest and largest objective of the profile."""
        return float(self.objectives.min()), float(self.objectives.max())

    def __str__(self) -> str:
        low, high = self.objective_range
        return (
            f"{self.name} {self.best:.3g} ({self.level:.0%}: {self.interval[0]:.3g} to "
            f"{self.interval[1]:.3g}); objective {low:.6g} to {high:.6g} for {self.name} of "
            f"{self.values[0]:.3g} to {self.values[-1]:.3g}"
        )


def profile(
    fitted: Fitted,
    table: pd.DataFrame,
    name: str,
    *,
    values: np.ndarray | None = None,
    level: float = 0.9,
) -> Profile:
    """Likelihood profile of a free coefficient.

    The interval holds the values whose likelihood ratio, with each configuration counting once, is
    within the limit of chi-squared, widened for residuals that are not of Laplace's distribution.

    Args:
        fitted: A fit of `fit_law`.
        table: The rows that were fitted.
        name: A coefficient that was free.
        values: Values to try; by default 31 from a hundredth to a hundred times the fitted one.
        level: Confidence of the interval.

    Raises:
        ConfigError: The coefficient was not free.
    """
    problem, start = posed(fitted, table)
    if name not in problem.free:
        free = ", ".join(problem.free)
        raise ConfigError(f"no profile of {name!r}: the free coefficients are {free}")
    centre = fitted.values[name]
    if values is None:
        values = centre * np.logspace(-2, 2, 31)
    low, high = POSSIBLE[name]
    values = np.unique(np.append(np.clip(values, low, high), centre))
    at_centre = int(np.argmin(np.abs(values - centre)))
    objectives = np.full(len(values), np.inf)
    # Outwards from the fit, then back: a profile that falls into a valley is then seen from both
    # sides.
    outward = [range(at_centre, len(values)), range(at_centre, -1, -1)]
    for path in (*outward, range(len(values)), range(len(values) - 1, -1, -1)):
        _walk(problem, problem.values(start), name, values, objectives, path)
    best = int(np.argmin(objectives))
    clusters = len(np.unique(cluster_codes(table)))
    ratio = 2 * clusters * np.log(objectives / objectives[best])
    # The ratio of absolute deviations is chi-squared for Laplace errors, and 1.6 times that for
    # normal ones. The median of the residuals' size against their mean tells them apart.
    sizes = np.abs(problem.residuals(start))
    widened = max(1.0, 2 * float(np.median(sizes) / max(sizes.mean(), 1e-300)))
    return Profile(
        name=name,
        values=values,
        objectives=objectives,
        best=float(values[best]),
        interval=_interval(values, ratio, widened * float(chi2.ppf(level, 1))),
        level=level,
    )


def _walk(
    problem: Problem,
    start: dict[str, np.ndarray],
    name: str,
    values: np.ndarray,
    objectives: np.ndarray,
    path: range,
) -> None:
    """Lower the objectives along a path, each fit starting where the one before it ended."""
    current = {key: float(value) for key, value in start.items()}
    for at in path:
        held = problem.replace(fixed={**problem.fixed, name: float(values[at])})
        end = held.solve(held.theta(current))
        current = {key: float(value) for key, value in held.values(end.theta).items()}
        objectives[at] = min(objectives[at], end.objective)


def _interval(values: np.ndarray, ratio: np.ndarray, limit: float) -> tuple[float, float]:
    """Outermost crossings of the limit, interpolated in the logarithm of the coefficient."""
    inside = np.flatnonzero(ratio <= limit)
    first, last = inside[0], inside[-1]
    logs = np.log(values)
    low, high = 0.0, float("inf")
    if first > 0:
        low = float(np.exp(np.interp(limit, ratio[[first, first - 1]], logs[[first, first - 1]])))
    if last < len(values) - 1:
        high = float(np.exp(np.interp(limit, ratio[[last, last + 1]], logs[[last, last + 1]])))
    return low, high
