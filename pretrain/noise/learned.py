"""Learned monotone noise schedule of Gaussian diffusion (Plaid, arXiv 2305.18619).

    gamma(t) = gamma_0 + (gamma_1 - gamma_0) g(t),   g = (h(t) - h(0)) / (h(1) - h(0))
    h(t) = sum_j c_j tanh(a_j (t - 1/2) + b_j),   a, c > 0

gamma = log(sigma^2 / alpha^2) with alpha^2 + sigma^2 = 1. The bound depends only on the two end
points; the path between them changes its variance alone. So the end points minimise the bound, and
g minimises its variance: as the mean of the loss L does not depend on g, the gradient of E[L^2],
which is E[2 L dL], is that of the variance. Everything is float64, because squares of alpha or
sigma near 0 or 1 and their logarithms are summed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

UNITS = 1024
"""Number of tanh steps in h."""


@dataclass(frozen=True)
class Level:
    """Noise level gamma and the factors that follow from it, float64 of any shape."""

    gamma: Tensor

    @property
    def alpha(self) -> Tensor:
        """Factor of the signal."""
        return torch.sigmoid(-self.gamma).sqrt()

    @property
    def sigma(self) -> Tensor:
        """Factor of the noise."""
        return torch.sigmoid(self.gamma).sqrt()

    @property
    def sharpness(self) -> Tensor:
        """Factor alpha / sigma^2: times z . e_v it is log N(z; alpha e_v, sigma^2) + constant."""
        return self.alpha / torch.sigmoid(self.gamma)

    def prior_kl(self, squared_norm: Tensor, size: int) -> Tensor:
        """KL(N(alpha e, sigma^2) || N(0, 1)) in nats, the sum over the `size` dimensions of e."""
        # sigma^2 - 1 - log sigma^2 = -alpha^2 + softplus(-gamma), which does not cancel.
        rest = F.softplus(-self.gamma) - torch.sigmoid(-self.gamma)
        return 0.5 * (size * rest + torch.sigmoid(-self.gamma) * squared_norm)


class LearnedSchedule(nn.Module):
    """Schedule gamma(t) and its derivative; parameters are float32, the arithmetic is float64."""

    def __init__(self, end_points: tuple[float, float]) -> None:
        super().__init__()
        self.end_points = nn.Parameter(torch.tensor(end_points))
        self.steepness = nn.Parameter(torch.zeros(UNITS))
        self.offset = nn.Parameter(torch.zeros(UNITS))
        self.height = nn.Parameter(torch.zeros(UNITS))

    def forward(self, t: Tensor, factor: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute gamma(t), d gamma / dt and gamma(1) for t float64 [b] in [0, 1], each [b].

        Gradients of g are multiplied by `factor` [b], which may be filled in after the forward
        pass; those of the end points are unchanged.
        """
        share, slope = self.shape(t)
        if factor is not None and share.requires_grad:
            for value in (share, slope):
                value.register_hook(lambda gradient: gradient * factor)
        first, last = self.end_points.double()
        span = last - first
        return first + span * share, span * slope, last.expand_as(t)

    def shape(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Compute g(t) and g'(t), float64 [b]; g(0) = 0 and g(1) = 1 exactly."""
        steepness, height = (F.softplus(p.double()) for p in (self.steepness, self.height))
        offset = self.offset.double()

        def steps(at: Tensor) -> Tensor:
            return torch.tanh(steepness * (at[..., None] - 0.5) + offset)

        start, end = steps(torch.zeros_like(t[:1])), steps(torch.ones_like(t[:1]))
        here = steps(t)
        rise = (end - start) @ height
        share = ((here - start) @ height) / rise
        slope = ((1.0 - here.square()) * steepness) @ height / rise
        return share, slope
