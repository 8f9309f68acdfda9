"""The numeric problem of a fit: a sum of Huber losses of log residuals over log coefficients.

The objective is a sum over points. Inside the optimizers it is rescaled to order 1 a point, because
their tolerances are absolute: on an average of order 1e-6 they stop early, which is how the first
published fit of this kind went wrong (arXiv 2404.10102).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import differential_evolution, minimize

from pretrain.study.fits.laws import Law

PLAUSIBLE: dict[str, tuple[float, float]] = {
    "A": (3.0, 3e5),
    "B": (3.0, 3e6),
    "E": (0.3, 3.5),
    "alpha": (0.1, 0.9),
    "beta": (0.08, 0.9),
    "R_D": (0.5, 1000.0),
    "R_N": (0.5, 1000.0),
    "p": (0.3, 3.0),
    "gamma": (0.1, 1.0),
    "c": (1.0, 1e6),
    "m": (0.05, 1.0),
    "k": (0.05, 1.0),
}
"""Range of each coefficient in which starts and the global check look."""

POSSIBLE: dict[str, tuple[float, float]] = {
    "A": (1e-6, 1e18),
    "B": (1e-6, 1e18),
    "E": (1e-6, 50.0),
    "alpha": (1e-3, 5.0),
    "beta": (1e-3, 5.0),
    "R_D": (1e-2, 1e6),
    "R_N": (1e-2, 1e6),
    "p": (1e-3, 50.0),
    "gamma": (1e-3, 10.0),
    "c": (1e-12, 1e18),
    "m": (1e-4, 5.0),
    "k": (1e-4, 5.0),
}
"""Limits of each coefficient in every fit."""

LEAST_ABSOLUTE = 5e-6
"""Threshold of Huber's loss that stands for absolute deviations."""


@dataclass(frozen=True)
class Solution:
    """Point at which an optimizer ended."""

    theta: np.ndarray
    """Logarithms of the free coefficients."""
    objective: float
    """Sum of Huber losses."""
    gradient: float
    """Largest component of the gradient, relative to the sum of its points' absolute values."""


@dataclass(frozen=True)
class Problem:
    """Points [n], law and settings of one fit."""

    law: Law
    params: np.ndarray
    tokens: np.ndarray
    unique: np.ndarray
    loss: np.ndarray
    weights: np.ndarray
    delta: float
    tied: Mapping[str, str]
    fixed: Mapping[str, float]

    @property
    def free(self) -> tuple[str, ...]:
        """Names of the coefficients that vary."""
        held = self.tied.keys() | self.fixed.keys()
        return tuple(name for name in self.law.coefficients if name not in held)

    def values(self, theta: np.ndarray) -> dict[str, np.ndarray]:
        """All coefficients [...] from the free ones [..., f]."""
        found = {name: np.exp(theta[..., i]) for i, name in enumerate(self.free)}
        found |= {name: np.full(theta.shape[:-1], value) for name, value in self.fixed.items()}
        return found | {name: found[source] for name, source in self.tied.items()}

    def theta(self, values: Mapping[str, float]) -> np.ndarray:
        """Logarithms of the free coefficients, moved inside their limits."""
        low, high = self.limits(POSSIBLE)
        given = np.array([values[name] for name in self.free], float)
        return np.clip(np.log(np.maximum(given, 1e-300)), low, high)

    def limits(self, ranges: Mapping[str, tuple[float, float]]) -> np.ndarray:
        """Logarithms of the limits [2, f] of the free coefficients."""
        return np.log([ranges[name] for name in self.free]).T.reshape(2, -1)

    def residuals(self, theta: np.ndarray) -> np.ndarray:
        """ln(predicted) - ln(measured) [..., n]."""
        values = {name: value[..., None] for name, value in self.values(theta).items()}
        predicted = self.law.loss(values, self.params, self.tokens, self.unique)
        return np.log(predicted) - np.log(self.loss)

    def objectives(self, theta: np.ndarray) -> np.ndarray:
        """Sum of Huber losses [...] for many points [..., f] at once."""
        return huber(self.residuals(theta), self.delta) @ self.weights

    def objective(self, theta: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Sum of Huber losses, its gradient [f], and the sum of absolute contributions to it."""
        residual, jacobian = self.jacobian(theta)
        pull = self.weights * np.clip(residual, -self.delta, self.delta)
        value = float(huber(residual, self.delta) @ self.weights)
        return value, pull @ jacobian, np.abs(pull) @ np.abs(jacobian)

    def jacobian(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Residuals [n] and their derivatives [n, f] with respect to the free logarithms."""
        loss, slopes = self.law.gradient(self.values(theta), self.params, self.tokens, self.unique)
        for name, source in self.tied.items():
            slopes[source] = slopes[source] + slopes[name]
        residual = np.log(loss) - np.log(self.loss)
        return residual, np.stack([slopes[name] for name in self.free], axis=-1) / loss[:, None]

    def solve(self, theta: np.ndarray, polish: bool = True) -> Solution:
        """Local minimum near a start: L-BFGS inside the limits, then BFGS.

        Thresholds far below the scatter are approached in steps, each a smooth problem.
        """
        if not len(self.free):
            return Solution(theta, float(self.objectives(theta)), 0.0)
        if polish and self.delta < 2e-4:
            theta = self.replace(delta=self.delta * 10).solve(theta).theta
        scale = 1 / (self.weights.sum() * self.delta * max(self.delta, 1e-4))

        def scaled(at: np.ndarray) -> tuple[float, np.ndarray]:
            with np.errstate(all="ignore"):  # a step may leave the range of exp
                value, slope, _ = self.objective(at)
            if not (np.isfinite(value) and np.isfinite(slope).all()):
                return 1e12, np.zeros_like(at)
            return value * scale, slope * scale

        bounds = list(self.limits(POSSIBLE).T)
        options = {"maxiter": 1000, "maxfun": 3000, "ftol": 1e-15, "gtol": 1e-10, "maxcor": 20}
        best = minimize(scaled, theta, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
        if polish:
            end = minimize(scaled, best.x, jac=True, method="BFGS", options={"gtol": 1e-10})
            low, high = self.limits(POSSIBLE)
            if end.fun < best.fun and np.all((low <= end.x) & (end.x <= high)):
                best = end
        return self.at(best.x)

    def whitening(self, theta: np.ndarray) -> np.ndarray:
        """Directions [f, f] in which equal steps change the residuals about equally.

        Flat directions get a bounded step: a long one would leave the valley of the optimum.
        """
        _, jacobian = self.jacobian(theta)
        size, axes = np.linalg.eigh(jacobian.T @ jacobian / len(jacobian))
        return axes / np.sqrt(np.maximum(size, size.max() * 1e-3))

    def refine(self, theta: np.ndarray, directions: np.ndarray) -> Solution:
        """Optimum near that of a similar problem, by BFGS along whitened directions.

        It takes a third of the time of `solve`, to which it returns where it does not arrive.
        """
        low, high = self.limits(POSSIBLE)
        scatter = max(self.delta, float(np.abs(self.residuals(theta)).mean()))
        scale = 1 / (self.weights.sum() * self.delta * scatter)

        def scaled(step: np.ndarray) -> tuple[float, np.ndarray]:
            moved = theta + directions @ step
            inside = np.clip(moved, low, high)
            with np.errstate(all="ignore"):  # a step may leave the range of exp
                value, slope, _ = self.objective(inside)
            if not (np.isfinite(value) and np.isfinite(slope).all()):
                return 1e12, np.zeros_like(step)
            return value * scale, directions.T @ np.where(inside == moved, slope, 0.0) * scale

        end = minimize(
            scaled, np.zeros(len(theta)), jac=True, method="BFGS", options={"gtol": 1e-3}
        )
        found = self.at(np.clip(theta + directions @ end.x, low, high))
        return found if found.gradient < 1e-4 else self.solve(theta, polish=False)

    def at(self, theta: np.ndarray) -> Solution:
        """Objective and relative gradient at a point; limits that hold the point do not count."""
        value, slope, parts = self.objective(theta)
        low, high = self.limits(POSSIBLE)
        inside = (theta > low + 1e-9) & (theta < high - 1e-9) & (parts > 0)
        relative = np.abs(slope[inside]) / parts[inside]
        return Solution(theta, value, float(relative.max(initial=0.0)))

    def replace(self, **changes: object) -> Problem:
        """The same problem with other weights, threshold, fixed coefficients or points."""
        return Problem(**{**self.__dict__, **changes})

    def starts(self, count: int = 12) -> list[np.ndarray]:
        """Best points of a grid over the plausible range, as starts."""
        levels = max(2, min(16, int(6000 ** (1 / len(self.free)))))
        low, high = self.limits(PLAUSIBLE)
        middles = (np.arange(levels) + 0.5) / levels
        axes = [a + (b - a) * middles for a, b in zip(low, high, strict=True)]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(self.free))
        few = self.thinned(300)
        with np.errstate(all="ignore"):  # corners of the range overflow
            found = np.concatenate([few.objectives(part) for part in np.array_split(grid, 8)])
        return list(grid[np.argsort(np.nan_to_num(found, nan=np.inf))[:count]])

    def search(self, seed: int = 0) -> Solution:
        """Best point that differential evolution finds in the plausible range, then polished.

        It evolves on at most 300 points, evenly chosen; the polish uses all.
        """
        few = self.thinned(300)
        scale = 1 / (few.weights.sum() * few.delta**2)
        with np.errstate(all="ignore"):  # corners of the range overflow
            found = differential_evolution(
                lambda thetas: np.nan_to_num(few.objectives(thetas.T) * scale, nan=np.inf),
                list(self.limits(PLAUSIBLE).T),
                vectorized=True,
                updating="deferred",
                popsize=12,
                maxiter=250,
                tol=1e-6,
                polish=False,
                rng=np.random.default_rng(seed),
            )
        return self.solve(np.asarray(found.x))

    def thinned(self, most: int) -> Problem:
        """At most that many points, evenly chosen in the order of loss, with the scatter's scale.

        The threshold is raised to 1e-3, so that coarse searches see a smooth objective.
        """
        order = np.argsort(self.loss)
        kept = order[np.linspace(0, len(order) - 1, min(most, len(order))).round().astype(int)]
        points = {
            name: getattr(self, name)[kept]
            for name in ("params", "tokens", "unique", "loss", "weights")
        }
        return self.replace(**points, delta=max(self.delta, 1e-3))


def huber(residual: np.ndarray, delta: float) -> np.ndarray:
    """Half the square up to `delta`, then linear."""
    size = np.abs(residual)
    near = np.minimum(size, delta)
    return near * (size - near / 2)
