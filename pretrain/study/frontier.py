"""Compute-optimal frontier of a law under U unique tokens: best size and epochs for each compute.

Compute is counted as C = 6 N D. For each C the law is minimised over N, with D = C / 6N. A grid
over ln N finds the basin, scipy refines it; all resamples and budgets are solved at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import elementwise

from pretrain.study.fits.fitted import RANGED, Fitted
from pretrain.study.fits.laws import Law, Values

SPAN = (1e-6, 1e9)
"""Searched sizes, relative to (C/6)^(1/2)."""
NUM_SIZES = 61
MAX_COMPUTE = 1e12
"""Largest searched compute, relative to one epoch of the compute-optimal size."""
REACH = 0.01
"""Nats by which an allocation inside the data may be worse than the best one."""
GAIN = 1e-3
"""Nats for ten times the compute below which compute counts as useless."""


@dataclass(frozen=True)
class Allocation:
    """Best use of compute; the arrays have one shape."""

    params: np.ndarray
    tokens: np.ndarray
    epochs: np.ndarray
    """Passes over the unique tokens, D/U."""
    loss: np.ndarray
    """Predicted loss in nats per token."""


def best_allocation(
    fitted: Fitted, flops: Any, unique: Any, *, resampled: bool = False
) -> Allocation:
    """Allocation with the lowest predicted loss that spends at most `flops` on `unique` tokens.

    `flops` and `unique` broadcast; with `resampled` each resample is a row: [r, ...]. Less than
    `flops` is spent where the law rises beyond some compute.
    """
    flops, unique = np.broadcast_arrays(np.asarray(flops, float), np.asarray(unique, float))
    values = resampled_values(fitted, flops.ndim) if resampled else fitted.values
    spent = np.minimum(flops, turn(fitted, unique, resampled=resampled))
    log_params, loss = minimise(fitted.law, values, spent, unique)
    params = np.exp(log_params)
    tokens = spent / 6 / params
    return Allocation(params, tokens, tokens / unique, loss)


def turn(fitted: Fitted, unique: Any, *, resampled: bool = False) -> np.ndarray:
    """Compute with the lowest loss of a law that rises beyond it; infinite for monotone laws."""
    if fitted.law.monotone:
        return np.full(np.shape(unique), np.inf)
    return saturation(fitted, unique, resampled=resampled, gain=0.0)


def resampled_values(fitted: Fitted, dimensions: int) -> dict[str, np.ndarray]:
    """Coefficients of all resamples [r, 1, ...], before `dimensions` axes."""
    shape = (-1, *[1] * dimensions)
    return {k: np.asarray(v, float).reshape(shape) for k, v in fitted.resamples.items()}


def minimise(law: Law, values: Values, flops: Any, unique: Any) -> tuple[np.ndarray, np.ndarray]:
    """ln N of the lowest loss at C = `flops`, and that loss; all arguments broadcast."""
    names = list(values)
    given = [np.asarray(v, float) for v in (flops, unique, *values.values())]
    shape = np.broadcast_shapes(*(v.shape for v in given))
    flat = [np.broadcast_to(v, shape).ravel() for v in given]

    def loss(log_params: np.ndarray, c: np.ndarray, u: np.ndarray, *args: np.ndarray) -> np.ndarray:
        params = np.exp(log_params)
        return law.loss(dict(zip(names, args, strict=True)), params, c / 6 / params, u)

    # Coefficients of a resample may be absurd where it is extrapolated; infinite losses lose.
    with np.errstate(over="ignore", divide="ignore", invalid="ignore", under="ignore"):
        relative = np.linspace(np.log(SPAN[0]), np.log(SPAN[1]), NUM_SIZES)
        grid = np.log(flat[0] / 6) / 2 + relative[:, None]
        losses = loss(grid, *flat)
        losses = np.where(np.isnan(losses), np.inf, losses)
        best = losses.argmin(axis=0)
        columns = np.arange(len(best))
        middle = best.clip(1, NUM_SIZES - 2)
        bracket = tuple(grid[middle + i, columns] for i in (-1, 0, 1))
        # The loss is flat at its minimum: 1e-6 of ln N is far below 1e-9 nats.
        close = {"xatol": 1e-6}
        found = elementwise.find_minimum(loss, bracket, args=tuple(flat), tolerances=close)
    # A flat or one-sided bracket has no solution: the point of the grid stands.
    at_grid = losses[best, columns]
    refined = found.success & (found.f_x <= at_grid)
    log_params = np.where(refined, found.x, grid[best, columns])
    return log_params.reshape(shape), np.where(refined, found.f_x, at_grid).reshape(shape)


def one_epoch_compute(fitted: Fitted, unique: Any) -> np.ndarray:
    """Smallest compute whose best allocation processes U tokens; below it nothing repeats."""

    def unread(log_flops: np.ndarray, u: np.ndarray) -> np.ndarray:
        flops = np.exp(log_flops)
        return minimise(fitted.law, fitted.values, flops, u)[0] - np.log(flops / 6 / u)

    low = np.log(6 * np.asarray(unique, float))
    return np.exp(first_root(unread, low, low + np.log(1e16), (unique,), points=49))


def saturation(
    fitted: Fitted, unique: Any, *, resampled: bool = False, gain: float = GAIN
) -> np.ndarray:
    """Smallest compute from which on ten times more of it would lower the loss by less than `gain`.

    The slope of the frontier at that compute decides, in nats per factor of ten. Infinite where
    that lies beyond `MAX_COMPUTE`, as for laws that know no repetition.
    """
    unique = np.asarray(unique, float)
    values = resampled_values(fitted, unique.ndim) if resampled else dict(fitted.values)
    names = list(values)
    first = np.log(one_epoch_compute(fitted, unique))

    def excess(log_flops: np.ndarray, u: np.ndarray, *args: np.ndarray) -> np.ndarray:
        named = dict(zip(names, args, strict=True))
        step = 0.05
        before, after = (
            minimise(fitted.law, named, np.exp(log_flops + sign * step), u)[1] for sign in (-1, 1)
        )
        with np.errstate(invalid="ignore"):
            return (before - after) / (2 * step) * np.log(10) - gain

    args = (unique, *values.values())
    return np.exp(first_root(excess, first, first + np.log(MAX_COMPUTE), args))


def first_root(
    function: Any, low: Any, high: Any, args: tuple[Any, ...], points: int = 25
) -> np.ndarray:
    """Smallest x of [low, high] where `function(x, *args)` falls to zero, elementwise.

    -inf where it is not positive at `low`, inf where it is positive at all `points`.
    """
    given = [np.asarray(v, float) for v in (low, high, *args)]
    shape = np.broadcast_shapes(*(v.shape for v in given))
    low, high, *flat = (np.broadcast_to(v, shape).ravel() for v in given)
    scan = low + (high - low) * np.linspace(0, 1, points)[:, None]
    values = function(scan, *(np.broadcast_to(v, scan.shape) for v in flat))
    fallen = values <= 0
    first = fallen.argmax(axis=0)
    columns = np.arange(len(first))
    result = np.where(fallen[0], -np.inf, np.inf)
    inside = fallen.any(axis=0) & ~fallen[0]
    if inside.any():
        rows, columns = first[inside], columns[inside]
        bracket = (scan[rows - 1, columns], scan[rows, columns])
        chosen = tuple(v[columns] for v in flat)
        solved = elementwise.find_root(function, bracket, args=chosen, tolerances={"xatol": 1e-7})
        result[inside] = solved.x
    return result.reshape(shape)


@dataclass(frozen=True)
class Contour:
    """Predicted loss over sizes and epochs at one budget of unique tokens."""

    unique_tokens: float
    params: np.ndarray
    """[n]"""
    epochs: np.ndarray
    """[e]"""
    loss: np.ndarray
    """[e, n]"""
    flops: np.ndarray
    """[e, n]"""
    supported: np.ndarray
    """[e, n], true inside the range of the fitted data."""
    path: Allocation
    """Best size and epochs for a series of compute inside the grid, from little to much."""


def contour(fitted: Fitted, unique: float, params: Any, epochs: Any) -> Contour:
    """Losses of the law for sizes [n] and epochs [e] at `unique` tokens."""
    params, epochs = np.asarray(params, float), np.asarray(epochs, float)
    tokens = epochs[:, None] * unique
    flops = 6 * params * tokens
    path = best_allocation(fitted, np.geomspace(flops.min(), flops.max(), 121), unique)
    inside = (path.params >= params.min()) & (path.params <= params.max())
    inside &= (path.epochs >= epochs.min()) & (path.epochs <= epochs.max())
    return Contour(
        unique_tokens=unique,
        params=params,
        epochs=epochs,
        loss=fitted.loss(params, tokens, unique),
        flops=flops,
        supported=supported(fitted, params, tokens, unique),
        path=Allocation(**{name: array[inside] for name, array in vars(path).items()}),
    )


def supported(fitted: Fitted, params: Any, tokens: Any, unique: Any) -> np.ndarray:
    """True where all quantities lie in the range of the fitted data; false without a range."""
    values = _ranged(params, tokens, unique)
    shape = np.broadcast_shapes(*(np.shape(v) for v in values.values()))
    result = np.full(shape, bool(fitted.support))
    for name, (low, high) in fitted.support.items():
        result &= (values[name] >= low * (1 - 1e-9)) & (values[name] <= high * (1 + 1e-9))
    return result


def within_reach(fitted: Fitted, flops: Any, unique: Any) -> np.ndarray:
    """True where the range of the data holds an allocation almost as good as the best at `flops`.

    Almost means within `REACH` nats by the law. Less compute may be spent, so that a law at its
    plateau needs no data there. False for laws without a range.
    """
    flops, unique = np.broadcast_arrays(np.asarray(flops, float), np.asarray(unique, float))
    everything = (0.0, np.inf)
    if not fitted.support:
        return np.zeros(flops.shape, bool)
    ranges = {name: fitted.support.get(name, everything) for name in RANGED}
    usable = np.isfinite(flops) & (flops > 0)
    best = best_allocation(fitted, np.where(usable, flops, 1e18), unique)
    spent = np.minimum(6 * best.params * best.tokens, ranges["flops"][1])
    tokens, epochs = ranges["tokens"], ranges["epochs"]
    least = np.maximum(ranges["params"][0], spent / 6 / np.minimum(tokens[1], epochs[1] * unique))
    most_tokens = np.maximum(tokens[0], epochs[0] * unique)
    with np.errstate(divide="ignore", invalid="ignore"):
        most = np.minimum(ranges["params"][1], spent / 6 / most_tokens)
        params = best.params.clip(least, most)
        worse = fitted.loss(params, spent / 6 / params, unique) - best.loss
    inside = usable & (flops >= ranges["flops"][0]) & (least <= most) & (worse <= REACH)
    low, high = ranges["unique_tokens"]
    return inside & (unique >= low * (1 - 1e-9)) & (unique <= high * (1 + 1e-9))


def outside(fitted: Fitted, params: float, tokens: float, unique: float) -> dict[str, str]:
    """Side on which a point leaves the data, `below` or `above`, by quantity."""
    values = _ranged(params, tokens, unique)
    result = {}
    for name, (low, high) in fitted.support.items():
        if not low * (1 - 1e-9) <= values[name] <= high * (1 + 1e-9):
            result[name] = "below" if values[name] < low else "above"
    return result


def _ranged(params: Any, tokens: Any, unique: Any) -> Mapping[str, Any]:
    params, tokens = np.asarray(params, float), np.asarray(tokens, float)
    return {
        "params": params,
        "tokens": tokens,
        "unique_tokens": np.asarray(unique, float),
        "epochs": tokens / unique,
        "flops": 6 * params * tokens,
    }
