"""Scaling laws as functions of parameters N, processed tokens D and unique tokens U.

A law has named coefficients in natural units and predicts the loss in nats per token. Coefficients
may be arrays (resamples of a bootstrap); they broadcast against N, D and U. Gradients are with
respect to the logarithms of the coefficients, which is what fits vary.

SoftQ (Xu et al., arXiv 2606.06888), which couples N and D, is missing: neither its repository nor
any copy of the paper that could be read gives the formula. `Coupled` is the older form that does.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import brentq

Values = Mapping[str, Any]
"""Coefficients by name: floats, or arrays that broadcast against N, D and U."""

Gradient = dict[str, np.ndarray]
"""Derivative of the loss with respect to the logarithm of each coefficient."""


class Law(ABC):
    """Form of a scaling law."""

    name: ClassVar[str]
    coefficients: ClassVar[tuple[str, ...]]
    """Names of the coefficients. All are positive, so that fits use their logarithms."""
    monotone: ClassVar[bool] = True
    """True where more tokens never raise the loss, so that overfitting cannot be described."""

    @abstractmethod
    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss in nats per token; arguments broadcast. N, D and U are counts."""

    @abstractmethod
    def gradient(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, Gradient]:
        """Loss, and its derivatives with respect to the logarithms of the coefficients."""


class SingleEpoch(Law):
    """E + A/N^alpha + B/D^beta (Hoffmann et al., arXiv 2203.15556, approach 3); U is ignored."""

    name = "single_epoch"
    coefficients: ClassVar[tuple[str, ...]] = ("A", "B", "E", "alpha", "beta")

    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss of N parameters after D fresh tokens."""
        return (
            values["E"]
            + values["A"] * np.asarray(params, float) ** -values["alpha"]
            + values["B"] * np.asarray(tokens, float) ** -values["beta"]
        )

    def gradient(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, Gradient]:
        """Loss, and its derivatives with respect to the logarithms of the coefficients."""
        log_size, log_data = np.log(params), np.log(tokens)
        size = values["A"] * np.exp(-values["alpha"] * log_size)
        data = values["B"] * np.exp(-values["beta"] * log_data)
        return values["E"] + size + data, {
            "A": size,
            "B": data,
            "E": np.full_like(size, values["E"]),
            "alpha": -values["alpha"] * size * log_size,
            "beta": -values["beta"] * data * log_data,
        }


class DataConstrained(SingleEpoch):
    """Single-epoch law of effective data and parameters (Muennighoff et al., arXiv 2305.16264).

    Repeats and excess parameters lose value exponentially, with the scales R_D and R_N.
    """

    name = "data_constrained"
    coefficients = ("A", "B", "E", "alpha", "beta", "R_D", "R_N")

    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss of N parameters after D tokens, of which U are unique."""
        data = effective_tokens(values, tokens, unique)
        size = effective_params(values, params, np.minimum(tokens, unique))
        return super().loss(values, size, data, unique)

    def gradient(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, Gradient]:
        """Loss, and its derivatives; those of N' pass through the optimal N of the fresh tokens."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        fresh = np.minimum(tokens, unique)
        data, _, by_repeats = _saturate(tokens, fresh, values["R_D"])
        optimal = optimal_params(values, fresh)
        excess = params > optimal
        size, by_used, by_excess = _saturate(params, np.minimum(params, optimal), values["R_N"])
        loss, slopes = super().gradient(values, size, data, unique)
        per_log_size = -values["alpha"] * slopes["A"]
        slopes["R_D"] = -values["beta"] * slopes["B"] * by_repeats
        slopes["R_N"] = per_log_size * by_excess
        through = np.where(excess, per_log_size * by_used, 0.0)
        for name, change in _optimal_params_gradient(values, fresh).items():
            slopes[name] = slopes[name] + through * change
        return loss, slopes


def _saturate(total: Any, used: Any, scale: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effective amount, and its log derivatives with respect to ln `used` and ln `scale`."""
    excess = (total / used - 1) / scale
    kept = np.exp(-excess)
    gained = -np.expm1(-excess)
    effective = used * (1 + scale * gained)
    by_used = used * (1 + scale * gained - (total / used) * kept) / effective
    return effective, by_used, used * scale * (gained - excess * kept) / effective


def _optimal_params_gradient(values: Values, tokens: Any) -> Gradient:
    """Derivatives of ln N_opt with respect to the logarithms of A, B, alpha and beta."""
    alpha, beta = values["alpha"], values["beta"]
    log_gain = np.log(balance(values))
    of_gain = 1 / (alpha + beta)
    power = 1 + beta / alpha
    moved = beta / alpha * (log_gain + np.log(tokens))
    return {
        "A": power * of_gain,
        "B": -power * of_gain,
        "alpha": power * of_gain * (1 - alpha * log_gain) - moved,
        "beta": -power * of_gain * (1 + beta * log_gain) + moved,
    }


def effective_tokens(values: Values, tokens: Any, unique: Any) -> np.ndarray:
    """D' = U [1 + R_D (1 - exp(-(D/U - 1)/R_D))]; D where no token is repeated."""
    tokens = np.asarray(tokens, float)
    fresh = np.minimum(tokens, unique)
    return fresh * (1 - values["R_D"] * np.expm1(-(tokens / fresh - 1) / values["R_D"]))


def effective_params(values: Values, params: Any, fresh: Any) -> np.ndarray:
    """N' = U_N [1 + R_N (1 - exp(-(N/U_N - 1)/R_N))] with U_N = min(N, N_opt of `fresh` tokens)."""
    params = np.asarray(params, float)
    used = np.minimum(params, optimal_params(values, fresh))
    return used * (1 - values["R_N"] * np.expm1(-(params / used - 1) / values["R_N"]))


def optimal_params(values: Values, tokens: Any) -> np.ndarray:
    """Parameters for which D fresh tokens are compute-optimal: G (G D)^(beta/alpha)."""
    gain = balance(values)
    return gain * (gain * np.asarray(tokens, float)) ** (values["beta"] / values["alpha"])


def balance(values: Values) -> Any:
    """G = (alpha A / (beta B))^(1/(alpha + beta)): optimal N = G (C/6)^a, D = (C/6)^b / G."""
    ratio = values["alpha"] * values["A"] / (values["beta"] * values["B"])
    return ratio ** (1 / (values["alpha"] + values["beta"]))


class InteriorOptimum(Law):
    """Law with a best number of epochs, beyond which the loss rises (Quokka, arXiv 2510.03280).

    D' = U e^p exp(-(max(0, e - 1)/e_p)^gamma) with e = D/U and e_p = c U^m / N^k. One pass or less
    is the single-epoch law.
    """

    name = "interior_optimum"
    coefficients = ("A", "B", "E", "alpha", "beta", "p", "gamma", "c", "m", "k")
    monotone = False

    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss of N parameters after D tokens, of which U are unique."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        fresh = np.minimum(tokens, unique)
        epochs = tokens / fresh
        scale = values["c"] * fresh ** values["m"] * params ** -values["k"]
        fading = np.exp(-(((epochs - 1) / scale) ** values["gamma"]))
        data = fresh * epochs ** values["p"] * fading
        size = values["A"] * params ** -values["alpha"]
        return values["E"] + size + values["B"] * data ** -values["beta"]

    def gradient(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, Gradient]:
        """Loss, and its derivatives with respect to the logarithms of the coefficients."""
        params, tokens = np.asarray(params, float), np.asarray(tokens, float)
        fresh = np.minimum(tokens, unique)
        log_size, log_fresh, log_epochs = np.log(params), np.log(fresh), np.log(tokens / fresh)
        log_scale = np.log(values["c"]) + values["m"] * log_fresh - values["k"] * log_size
        # At one epoch the fading is zero, and so are its derivatives.
        log_ratio = np.log(np.maximum(np.expm1(log_epochs), 1e-300)) - log_scale
        fading = np.exp(values["gamma"] * log_ratio)
        log_data = log_fresh + values["p"] * log_epochs - fading
        size = values["A"] * np.exp(-values["alpha"] * log_size)
        data = values["B"] * np.exp(-values["beta"] * log_data)
        pull = values["beta"] * data
        slope = pull * fading * values["gamma"]
        return values["E"] + size + data, {
            "A": size,
            "B": data,
            "E": np.full_like(size, values["E"]),
            "alpha": -values["alpha"] * size * log_size,
            "beta": -pull * log_data,
            "p": -pull * values["p"] * log_epochs,
            "gamma": slope * log_ratio,
            "c": -slope,
            "m": -slope * values["m"] * log_fresh,
            "k": slope * values["k"] * log_size,
        }


def best_epochs(values: Values, params: float, unique: float) -> float:
    """Epochs of the lowest loss of `InteriorOptimum`; 1 where a repetition never helps.

    It solves p = gamma ((e - 1)/e_p)^gamma e/(e - 1), of which e_p itself is no solution.
    """
    scale = values["c"] * unique ** values["m"] * params ** -values["k"]
    gamma = values["gamma"]

    def surplus(log_repeats: float) -> float:
        repeats = np.exp(log_repeats)
        return values["p"] - gamma * (repeats / scale) ** gamma * (1 + 1 / repeats)

    # For gamma < 1 the surplus is negative just after the first epoch, positive up to the optimum.
    grid = np.linspace(np.log(1e-3), np.log(1e9), 400)
    helps = np.flatnonzero([surplus(at) > 0 for at in grid])
    if not len(helps):
        return 1.0
    if helps[-1] == len(grid) - 1:
        return float("inf")
    return 1 + float(np.exp(brentq(surplus, grid[helps[-1]], grid[helps[-1] + 1])))


class Coupled(Law):
    """E + [(A/N^alpha)^(1/beta) + (B/U^beta)^(1/beta)]^beta, for the best stop of each run.

    The form of Kaplan et al. (arXiv 2001.08361, equation 1.5) with an entropy. Size and data are
    coupled: the scarcer one decides. Only unique tokens count, so that rows are early-stopped runs.
    """

    name = "coupled"
    coefficients = ("A", "B", "E", "alpha", "beta")

    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss of N parameters after the best number of passes over U tokens."""
        size, data = self._log_terms(values, params, tokens, unique)
        beta = values["beta"]
        return values["E"] + np.exp(beta * np.logaddexp(size / beta, data / beta))

    def gradient(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, Gradient]:
        """Loss, and its derivatives with respect to the logarithms of the coefficients."""
        size, data = self._log_terms(values, params, tokens, unique)
        alpha, beta = values["alpha"], values["beta"]
        joint = np.logaddexp(size / beta, data / beta)
        reducible = np.exp(beta * joint)
        of_size, of_data = np.exp(size / beta - joint), np.exp(data / beta - joint)
        log_data = (np.log(values["B"]) - data) / beta
        by_beta = joint - (of_size * size + of_data * data) / beta - of_data * log_data
        return values["E"] + reducible, {
            "A": reducible * of_size,
            "B": reducible * of_data,
            "E": np.full_like(reducible, values["E"]),
            "alpha": -reducible * of_size * alpha * np.log(params),
            "beta": reducible * beta * by_beta,
        }

    def _log_terms(
        self, values: Values, params: Any, tokens: Any, unique: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Logarithms of A/N^alpha and B/U^beta."""
        fresh = np.minimum(np.asarray(tokens, float), unique)
        size = np.log(values["A"]) - values["alpha"] * np.log(np.asarray(params, float))
        return size, np.log(values["B"]) - values["beta"] * np.log(fresh)


LAWS: dict[str, Law] = {
    law.name: law for law in (SingleEpoch(), DataConstrained(), InteriorOptimum(), Coupled())
}
"""Laws by name."""
