"""Noise schedules: alpha_t, the probability that a token is still clean, and its derivative.

t = 0 is clean, t = 1 is noise. The bound of a masked or uniform model does not depend on the
schedule; only its variance does, and the noise levels that training sees most. Linear has weight
exactly 1/t and drops no term at either end. Log-linear has the epsilon of the MDLM code, for
comparison with it.
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
    """Functions alpha(t) and d alpha / dt of float64 tensors of any shape."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    alpha_prime: Callable[[Tensor], Tensor]
    noise: Callable[[Tensor], Tensor]
    """Function 1 - alpha(t), without cancellation at small t."""

    def elbo_weight(self, t: Tensor) -> Tensor:
        """Weight -alpha' / (1 - alpha) of a masked token's cross-entropy (MDLM eq. 10)."""
        return -self.alpha_prime(t) / self.noise(t)

    @property
    def mean_noise(self) -> float:
        """Mean of 1 - alpha over t in (0, 1): the share of tokens that are masked or redrawn."""
        return midpoint_mean(self.noise)


def midpoint_mean(f: Callable[[Tensor], Tensor], nodes: int = 1000) -> float:
    """Mean of f over (0, 1): exact if linear, to 1e-6 if smooth, to 1e-4 with a square root."""
    return float(f((torch.arange(nodes, dtype=torch.float64) + 0.5) / nodes).mean())


LINEAR = Schedule("linear", lambda t: 1.0 - t, lambda t: -torch.ones_like(t), lambda t: t)
LOG_LINEAR = Schedule(
    "log_linear",
    lambda t: 1.0 - (1.0 - LOG_LINEAR_EPS) * t,
    lambda t: torch.full_like(t, LOG_LINEAR_EPS - 1.0),
    lambda t: (1.0 - LOG_LINEAR_EPS) * t,
)
"""Schedule sigma_t = -log(1 - (1 - eps) t) of MDLM: at t = 1 a share eps is still clean."""
COSINE = Schedule(
    "cosine",
    lambda t: 2.0 * torch.sin(math.pi / 4.0 * (1.0 - t)).square(),  # 1 - cos(pi (1 - t) / 2)
    lambda t: -math.pi / 2.0 * torch.cos(math.pi / 2.0 * t),
    lambda t: torch.sin(math.pi / 2.0 * t),
)
SCHEDULES = {s.name: s for s in (LINEAR, LOG_LINEAR, COSINE)}
