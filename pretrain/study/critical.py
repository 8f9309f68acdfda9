"""Critical compute: the least compute with which a challenger's law meets the reference's.

At each compute both laws take their best size, with C = 6 N D and U unique tokens. No crossing
counts as infinity; zero means that the challenger is better from one epoch on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pretrain.study.fits.fitted import Fitted
from pretrain.study.frontier import (
    MAX_COMPUTE,
    first_root,
    minimise,
    one_epoch_compute,
    resampled_values,
    turn,
    within_reach,
)

PUBLISHED_COEFFICIENT = 2.12e15
PUBLISHED_SLOPE = 2.174
"""Law printed in arXiv 2507.15857, masked against autoregressive: C = 2.12e15 (U / 1e6)^2.174."""
REFERENCE = "autoregressive"
INTERVAL = (0.05, 0.95)


def published_critical(unique: Any) -> np.ndarray:
    """FLOPs at the crossing by the printed law of arXiv 2507.15857 for `unique` tokens."""
    return PUBLISHED_COEFFICIENT * (np.asarray(unique, float) / 1e6) ** PUBLISHED_SLOPE


def pair(
    challenger: Fitted, reference: Fitted, *, include_entropy: bool = True, resampled: bool = False
) -> tuple[Fitted, Fitted]:
    """Both fits with equally many resamples, which are paired by number, or with none.

    A fit without resamples keeps its coefficients. Without entropy E is 0 in both.
    """
    counts = [num_resamples(fitted) for fitted in (challenger, reference)]
    number = min((n for n in counts if n), default=0) if resampled else 0
    dropped = {} if include_entropy else {"E": 0.0}
    pairs = []
    for fitted in (challenger, reference):
        kept = {name: list(v)[:number] for name, v in fitted.resamples.items()}
        zeros = {name: [value] * number for name, value in dropped.items()}
        values = {**fitted.values, **dropped}
        resamples = {**kept, **zeros} if number and kept else {}
        pairs.append(replace(fitted, values=values, resamples=resamples))
    return pairs[0], pairs[1]


def coefficients(fitted: Fitted, dimensions: int) -> Mapping[str, Any]:
    """Coefficients of all resamples [r, 1, ...] before `dimensions` axes; else the fitted ones."""
    return resampled_values(fitted, dimensions) if fitted.resamples else fitted.values


def num_resamples(fitted: Fitted) -> int:
    """Number of resamples of a fit."""
    return min((len(values) for values in fitted.resamples.values()), default=0)


def crossing(
    challenger: Fitted,
    reference: Fitted,
    unique: Any,
    *,
    include_entropy: bool = True,
    resampled: bool = False,
    flops_range: tuple[float, float] | None = None,
) -> np.ndarray:
    """Critical compute in FLOPs for `unique` tokens, [...] or of all resamples [r, ...].

    The search begins where the first of the two laws would repeat tokens, and ends a factor of
    `MAX_COMPUTE` above; `flops_range` replaces that range. 0 where the challenger is better at its
    lower end, infinity where it is nowhere better.
    """
    unique = np.asarray(unique, float)
    fits = pair(challenger, reference, include_entropy=include_entropy, resampled=resampled)
    ours, theirs = (coefficients(fitted, unique.ndim) for fitted in fits)
    # A law that rises is stopped where it is lowest, as a run would be.
    stops = [np.log(turn(fitted, unique, resampled=bool(fitted.resamples))) for fitted in fits]
    split = 2 + len(ours)

    def gap(log_flops: np.ndarray, u: np.ndarray, *args: np.ndarray) -> np.ndarray:
        losses = [
            minimise(
                fitted.law,
                dict(zip(names, part, strict=True)),
                np.exp(np.minimum(log_flops, stop)),
                u,
            )[1]
            for fitted, names, part, stop in (
                (challenger, ours, args[2:split], args[0]),
                (reference, theirs, args[split:], args[1]),
            )
        ]
        return losses[0] - losses[1]

    if flops_range is None:
        low = np.minimum(
            one_epoch_compute(challenger, unique), one_epoch_compute(reference, unique)
        )
        bounds = low, low * MAX_COMPUTE
    else:
        bounds = np.float64(flops_range[0]), np.float64(flops_range[1])
    args = (unique, *stops, *ours.values(), *theirs.values())
    return np.exp(first_root(gap, np.log(bounds[0]), np.log(bounds[1]), args))


@dataclass(frozen=True)
class Line:
    """Straight line log10 C = slope log10(U / 1e6) + intercept."""

    slope: float
    intercept: float
    points: int
    """Number of finite crossings it was fitted to; below two there is no line (nan)."""

    def flops(self, unique: Any) -> np.ndarray:
        """Critical compute on the line."""
        return 10.0 ** (self.intercept + self.slope * np.log10(np.asarray(unique, float) / 1e6))


def fit_line(unique: Any, flops: Any) -> Line:
    """Least-squares line in logarithms; infinite and zero crossings are left out."""
    unique, flops = np.asarray(unique, float), np.asarray(flops, float)
    finite = np.isfinite(flops) & (flops > 0)
    if finite.sum() < 2:
        return Line(np.nan, np.nan, int(finite.sum()))
    slope, intercept = np.polyfit(np.log10(unique[finite] / 1e6), np.log10(flops[finite]), 1)
    return Line(float(slope), float(intercept), int(finite.sum()))


@dataclass(frozen=True)
class CriticalLine:
    """Critical compute of one pair of fits over U."""

    challenger: Fitted
    reference: Fitted
    include_entropy: bool
    unique_tokens: np.ndarray
    """[u]"""
    flops: np.ndarray
    """[u], infinite without a crossing, 0 where the challenger is better from one epoch on."""
    line: Line
    supported: np.ndarray
    """[u], true where the data of both fits reach the crossing."""
    resampled: np.ndarray = field(default_factory=lambda: np.empty((0, 0)))
    """[r, u], empty without resamples."""

    @property
    def band(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Bounds [u] of the 90 % interval of the resamples."""
        return interval(self.resampled) if self.resampled.size else None

    @property
    def slope_interval(self) -> tuple[float, float] | None:
        """90 % interval of the slope over resamples that cross at two budgets or more."""
        slopes = [fit_line(self.unique_tokens, flops).slope for flops in self.resampled]
        finite = np.array([slope for slope in slopes if np.isfinite(slope)])
        if not finite.size:
            return None
        low, high = interval(finite)
        return float(low), float(high)

    @property
    def share_without_crossing(self) -> np.ndarray:
        """Share [u] of the resamples that do not cross; empty without resamples."""
        return np.isinf(self.resampled).mean(axis=0) if self.resampled.size else np.empty(0)

    @property
    def bias(self) -> str:
        """Sentence on what bounds do to the crossing; empty where both losses are exact."""
        return bound_bias(self.challenger, self.reference)


def bound_bias(challenger: Fitted, reference: Fitted) -> str:
    """Sentence on what a bound does to the crossing; empty where both losses are exact."""
    bounds = (challenger.likelihood == "bound", reference.likelihood == "bound")
    if bounds == (True, False):
        return (
            f"{challenger.family} is measured by a bound, {reference.family} exactly: the "
            "crossing of the likelihoods comes earlier"
        )
    if bounds == (False, True):
        return (
            f"{reference.family} is measured by a bound, {challenger.family} exactly: the "
            "crossing of the likelihoods comes later"
        )
    return "both are measured by bounds of unknown gaps" if all(bounds) else ""


def interval(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Outer bounds [...] of the 90 % interval of samples [r, ...], which may be infinite."""
    low = np.quantile(samples, INTERVAL[0], axis=0, method="lower")
    return low, np.quantile(samples, INTERVAL[1], axis=0, method="higher")


def critical_line(
    challenger: Fitted, reference: Fitted, unique: Sequence[float], *, include_entropy: bool = True
) -> CriticalLine:
    """Critical compute at each of `unique` tokens with its band, line and supported region."""
    budgets = np.asarray(unique, float)
    flops = crossing(challenger, reference, budgets, include_entropy=include_entropy)
    resampled = np.empty((0, 0))
    if num_resamples(challenger) or num_resamples(reference):
        columns = [  # one budget at a time bounds the memory of the search
            crossing(challenger, reference, budget, include_entropy=include_entropy, resampled=True)
            for budget in budgets
        ]
        resampled = np.stack(columns, axis=1)
    supported = within_reach(challenger, flops, budgets) & within_reach(reference, flops, budgets)
    return CriticalLine(
        challenger=challenger,
        reference=reference,
        include_entropy=include_entropy,
        unique_tokens=budgets,
        flops=flops,
        line=fit_line(budgets, flops),
        supported=supported,
        resampled=resampled,
    )


@dataclass(frozen=True)
class Comparison:
    """Critical compute of one pair of arms, by each likelihood of the challenger that was fitted.

    A bound is never below the likelihood, so that its crossing comes late; with both, the truth
    is `exact` and the distance of `bound` shows by how much.
    """

    exact: CriticalLine | None
    bound: CriticalLine | None

    @property
    def lines(self) -> list[CriticalLine]:
        """Lines that exist, exact first."""
        return [line for line in (self.exact, self.bound) if line is not None]

    @property
    def lateness(self) -> np.ndarray | None:
        """Ratio [u] of the bound's crossing to the exact one, where both were fitted."""
        if self.exact is None or self.bound is None:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            return self.bound.flops / self.exact.flops


def compare(
    fits: Iterable[Fitted],
    unique: Sequence[float],
    *,
    reference: str = REFERENCE,
    include_entropy: bool = True,
) -> list[Comparison]:
    """Comparisons of every arm of other families with every arm of the family `reference`."""
    fits = list(fits)
    found: dict[tuple[str, ...], dict[str, CriticalLine]] = {}
    for ours in (fitted for fitted in fits if fitted.family != reference):
        for theirs in (fitted for fitted in fits if fitted.family == reference):
            key = (ours.family, ours.arm, theirs.arm, theirs.likelihood)
            line = critical_line(ours, theirs, unique, include_entropy=include_entropy)
            found.setdefault(key, {})[ours.likelihood] = line
    return [Comparison(lines.get("exact"), lines.get("bound")) for lines in found.values()]
