"""Duality of Gaussian and uniform-state diffusion (Duo, arXiv 2506.10892, section 3).

The argmax of a one-hot token in Gaussian noise, w = a x + s eps with a^2 + s^2 = 1, has the law of
a token under uniform noise. The share of clean tokens is alpha = T(mu), mu = a / s:

    T(mu) = K / (K - 1) [ int phi(u - mu) Phi(u)^(K-1) du - 1 / K ]

The three integrals below are rearranged so that no digits cancel at either end: small alpha and
small 1 - alpha both have full relative accuracy, for K from 2 to a million. Each is a trapezoidal
sum over one fixed grid, which converges exponentially for such integrands. There is neither a table
nor a polynomial, and the derivative is an integral too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pretrain.noise.schedule import Schedule

LARGEST_SIGNAL = 24.0
"""Largest mu: above it alpha is 1 to the last bit for every K below 10^40."""
_STEP = 1.0 / 16.0
_LOW, _HIGH = -10.0, 22.0


@dataclass(frozen=True)
class Duality:
    """Function T for K states; mu in (0, LARGEST_SIGNAL] and results are float64 of any shape."""

    num_states: int

    def __post_init__(self) -> None:
        assert self.num_states >= 2, "a uniform noise needs two states"

    def alpha(self, mu: Tensor) -> Tensor:
        """Compute T(mu) = K / (K - 1) int phi(u) (e^(mu u - mu^2 / 2) - 1) Phi(u)^(K-1) du."""
        u, log_cdf = _grid(mu)
        rest = torch.expm1(mu[..., None] * u - 0.5 * mu[..., None].square())
        small = self._integral(_density(u) * ((self.num_states - 1) * log_cdf).exp() * rest)
        noise = self.noise(mu)
        return torch.where(noise < 0.5, 1.0 - noise, small)

    def noise(self, mu: Tensor) -> Tensor:
        """Compute 1 - T(mu) = K / (K - 1) int phi(u - mu) (1 - Phi(u)^(K-1)) du."""
        u, log_cdf = _grid(mu)
        lost = -torch.expm1((self.num_states - 1) * log_cdf)
        return self._integral(_density(u - mu[..., None]) * lost)

    def slope(self, mu: Tensor) -> Tensor:
        """Compute dT / dmu = K int phi(u - mu) phi(u) Phi(u)^(K-2) du, by parts."""
        u, log_cdf = _grid(mu)
        kept = ((self.num_states - 2) * log_cdf).exp()
        total = self._integral(_density(u - mu[..., None]) * _density(u) * kept)
        return (self.num_states - 1) * total

    def signal(self, alpha: float) -> float:
        """Solve T(mu) = alpha for mu, alpha in (0, 1), by bisection in log mu."""
        low, high = -50.0, math.log(LARGEST_SIGNAL)
        for _ in range(80):
            middle = 0.5 * (low + high)
            mu = torch.tensor(math.exp(middle), dtype=torch.float64)
            below = self.alpha(mu) < alpha if alpha < 0.5 else self.noise(mu) > 1.0 - alpha
            low, high = (middle, high) if below else (low, middle)
        return math.exp(0.5 * (low + high))

    def _integral(self, values: Tensor) -> Tensor:
        return values.sum(dim=-1) * (_STEP * self.num_states / (self.num_states - 1))


@dataclass(frozen=True)
class GaussianTime:
    """Time t in [0, 1], linear in gamma = -2 log mu, the negative log-SNR of the Gaussian."""

    start: float
    """gamma at t = 0, the clean end."""
    stop: float
    """gamma at t = 1, the noisy end."""

    @staticmethod
    def between(duality: Duality, interval: tuple[float, float]) -> GaussianTime:
        """Time over which alpha runs through `interval` (smallest, largest), falling."""
        low, high = interval
        return GaussianTime(
            -2.0 * math.log(duality.signal(high)), -2.0 * math.log(duality.signal(low))
        )

    def signal(self, t: Tensor) -> Tensor:
        """Signal mu at t."""
        return torch.exp(-0.5 * (self.start + (self.stop - self.start) * t))


@cache
def duality_schedule(num_states: int, interval: tuple[float, float]) -> Schedule:
    """Noise schedule alpha(t) = T(mu(t)) of a Gaussian's argmax over an interval of alpha."""
    duality = Duality(num_states)
    time = GaussianTime.between(duality, interval)

    def alpha_prime(t: Tensor) -> Tensor:
        mu = time.signal(t)
        return duality.slope(mu) * mu * (-0.5 * (time.stop - time.start))

    return Schedule(
        "duality",
        lambda t: duality.alpha(time.signal(t)),
        alpha_prime,
        lambda t: duality.noise(time.signal(t)),
    )


def _grid(like: Tensor) -> tuple[Tensor, Tensor]:
    """Nodes u and log Phi(u); mass outside of them is below 10^-22 of any integrand's."""
    count = round((_HIGH - _LOW) / _STEP) + 1
    u = torch.linspace(_LOW, _HIGH, count, dtype=torch.float64, device=like.device)
    return u, torch.special.log_ndtr(u)


def _density(u: Tensor) -> Tensor:
    return torch.exp(-0.5 * u.square()) / math.sqrt(2.0 * math.pi)
