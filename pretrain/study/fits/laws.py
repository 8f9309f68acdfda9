"""Scaling laws as functions of parameters N, processed tokens D and unique tokens U.

A law has named coefficients in natural units and predicts the loss in nats per token. Coefficients
may be arrays (resamples of a bootstrap); they broadcast against N, D and U.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

Values = Mapping[str, Any]
"""Coefficients by name: floats, or arrays that broadcast against N, D and U."""


class Law(ABC):
    """Form of a scaling law."""

    name: ClassVar[str]
    coefficients: ClassVar[tuple[str, ...]]
    """Names of the coefficients. All are positive, so that fits use their logarithms."""

    @abstractmethod
    def loss(self, values: Values, params: Any, tokens: Any, unique: Any) -> np.ndarray:
        """Loss in nats per token; arguments broadcast. N, D and U are counts."""


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


LAWS: dict[str, Law] = {
    law.name: law for law in (SingleEpoch(), DataConstrained(), InteriorOptimum())
}
"""Laws by name."""
