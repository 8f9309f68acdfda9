"""Noise schedules: alpha_t, the probability that a token is still clean, and its derivative.

t = 0 is clean, t = 1 is noise. The bound of a masked or uniform model does not depend on the
schedule, only its variance does (and what training dwells on). Linear has weight exactly 1/t and
drops no term at either end; log-linear keeps the epsilon of the MDLM code for comparison with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LOG_LINEAR_EPS = 1e-3


@dataclass(frozen=True)
class Schedule:
    """alpha(t) and d alpha / dt, both for float64 tensors of any shape."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    alpha_prime: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor], Tensor]
    """1 - alpha(t), without the cancellation at small t."""

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha' / (1 - alpha), the weight of a masked token's cross-entropy (MDLM eq. 10)."""
        return -self.alpha_prime(t) / self.noise(t)

    @property
    def mean_noise(self) -> float:
        """Mean of 1 - alpha over t in (0, 1): the share of tokens that are masked or redrawn."""
        return midpoint_mean(self.noise)


def midpoint_mean(f: Callable[[Tensor], Tensor], nodes: int = 1000) -> float:
    """Mean of f over (0, 1): exact where linear, to 1e-6 where smooth, to 1e-4 beside a root."""
    return float(f((torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes).mean())


LINEAR = Schedule("linear", lambda t: 1.0 - t, lambda t: -torch.ones_like(t), lambda t: t)
LOG_LINEAR = Schedule(
    "log_linear",
    lambda t: 1.0 - (1.0 - LOG_LINEAR_EPS) * t,
    lambda t: torch.full_like(t, LOG_LINEAR_EPS - 1.0),
    lambda t: (1.0 - LOG_LINEAR_EPS) * t,
)
"""sigma_t = -log(1 - (1 - eps) t) of MDLM; at t = 1 a share eps of the tokens is still clean."""
COSINE = Schedule(
    "cosine",
    lambda t: 2.0 * torch.sin(math.pi / 4.0 * (1.0 - t)).square(),  # 1 - cos(pi (1 - t) / 2)
    lambda t: -math.pi / 2.0 * torch.cos(math.pi / 2.0 * t),
    lambda t: torch.sin(math.pi / 2.0 * t),
)
SCHEDULES = {s.name: s for s in (LINEAR, LOG_LINEAR, COSINE)}
