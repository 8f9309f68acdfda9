"""Noise schedules: alpha_t, the probability that a token is still clean, and its derivative.

t = 0 is clean, t = 1 is noise. The bound of a masked model does not depend on the schedule, only
its variance does; linear has weight exactly 1/t and drops no term at either end.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """alpha(t) and d alpha / dt, both for float64 tensors of any shape."""

    name: str
    alpha: Callable[[Tensor], Tensor]
    alpha_prime: Callable[[Tensor], Tensor]

    def elbo_weight(self, t: Tensor) -> Tensor:
        """-alpha' / (1 - alpha), the weight of a masked token's cross-entropy (MDLM eq. 10)."""
        return -self.alpha_prime(t) / (1.0 - self.alpha(t))


LINEAR = Schedule("linear", lambda t: 1.0 - t, lambda t: -t.new_ones(t.shape))
