"""Interpolating noise: over time a token is replaced by uniform noise, by <mask>, or by either.

    q_t(z | x) = alpha 1[z = x] + r 1[z is allowed] + m 1[z = <mask>],     alpha + K r + m = 1

A `Marginal` holds these masses at given times and the weights of the continuous-time bound for the
three cases of z (von Rutte et al., GIDD, arXiv 2503.04482):

    -log p(x) <= E_t E_z w_t(z, x) [ KL(q_t(.|x) || q_t(.|x_theta)) + IS(q_t(z|x), q_t(z|x_theta)) ]
    w_t(z, x) = alpha / q_t(z|x) * d/dt (noise mass of z / alpha)

Everything is float64 and exact on the open interval (0, 1): no level is clipped, so that no term of
the bound is dropped at either end. K counts the allowed ids; <mask> is never one of them. Uniform
noise may draw the token itself.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import LINEAR, Schedule, midpoint_mean
from pretrain.vocabulary import TokenSpace


@dataclass(frozen=True)
class Marginal:
    """Masses and weights of the bound at times t, float64 tensors of the shape of t."""

    alpha: Tensor
    """Probability that the token survived."""
    uniform: Tensor
    """Noise mass r of each allowed id."""
    mask: Tensor
    """Noise mass m of <mask>."""
    mask_weight: Tensor
    """Weight w_t where z is <mask>."""
    noise_weight: Tensor
    """Weight w_t where z is an allowed id other than x."""
    clean_weight: Tensor
    """Weight w_t where z = x (survived, or replaced by itself)."""


class NoiseProcess(ABC):
    """Family of marginals over t in [0, 1]; t = 0 is clean."""

    spread: ClassVar[float] = 2.0
    """Power of `spread_time` under which an estimate of the bound has finite variance."""
    mask_only: bool = False
    """True where a noisy token is always <mask>; clean tokens then carry no loss."""

    def __init__(self, space: TokenSpace) -> None:
        self.space = space
        self.num_targets = space.num_targets
        excluded = set(space.excluded_columns)
        self.allowed = torch.tensor(
            [i for i in range(space.padded_vocab_size) if i not in excluded], dtype=torch.int64
        )

    @abstractmethod
    def masses(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute alpha, r and m at t in [0, 1]."""

    @property
    def mean_noise(self) -> float:
        """Mean of 1 - alpha over t in (0, 1): the share of tokens that are replaced by noise."""
        return 1.0 - midpoint_mean(lambda t: self.masses(t)[0])

    @abstractmethod
    def marginal(self, t: Tensor) -> Marginal:
        """Compute masses and weights at t in (0, 1)."""

    def draw(self, x0: Tensor, marginal: Marginal, noise: NoiseKey) -> tuple[Tensor, Tensor]:
        """Draw z_t ~ q_t(. | x0), int64 [b, s]; also True where a token was redrawn, bool [b, s].

        One uniform decides what happens to a token, and a second one the id that replaces it.
        """
        length = x0.shape[1]
        u = noise.uniform("noise", length)
        redrawn = u < self.num_targets * marginal.uniform
        masked = ~redrawn & (u < self.num_targets * marginal.uniform + marginal.mask)
        index = (noise.uniform("replacement", length) * self.num_targets).long()
        z = torch.where(redrawn, self.allowed[index], x0)
        return torch.where(masked, self.space.mask_id, z), redrawn

    def reverse(self, x_theta: Tensor, z: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Compute p(z_s | z_t, x_theta) [n, v] for s < t [n], by Bayes' rule for x_theta.

        x_theta [n, v] holds probabilities of the clean token, zero outside the allowed ids; z is
        [n]. Rows sum to one for any x_theta, also where x_theta gives z the probability zero: a
        token that no noise could have drawn is the clean one, even if a nucleus excludes it.
        """
        alpha_t, r_t, m_t = (x[:, None] for x in self.masses(t))
        alpha_s, r_s, m_s = (x[:, None] for x in self.masses(s))
        survive = alpha_t / alpha_s
        # Probability to arrive at z_t from any other state between s and t.
        is_mask = z[:, None] == self.space.mask_id
        arrive = torch.where(is_mask, m_t - survive * m_s, r_t - survive * r_s).clamp(min=0.0)
        prior = alpha_s * x_theta
        prior[:, self.allowed.to(z.device)] += r_s
        prior[:, self.space.mask_id] += m_s[:, 0]
        stay = survive * prior.gather(1, z[:, None])
        stay = torch.where(arrive > 0, stay, 1.0)
        joint = (arrive * prior).scatter_add(1, z[:, None], stay)
        return joint / joint.sum(dim=1, keepdim=True)


class UniformProcess(NoiseProcess):
    """Process that redraws each token with probability 1 - alpha (D3PM-uniform, UDLM, Duo)."""

    def __init__(self, space: TokenSpace, schedule: Schedule = LINEAR) -> None:
        super().__init__(space)
        self.schedule = schedule

    def masses(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute alpha, (1 - alpha) / K and 0."""
        return self.schedule.alpha(t), self.schedule.noise(t) / self.num_targets, t * 0.0

    def marginal(self, t: Tensor) -> Marginal:
        """Compute masses, and the weights of the log-SNR form times |d lambda / dt|."""
        alpha, r, m = self.masses(t)
        noise = self.schedule.noise(t)
        speed = -self.schedule.alpha_prime(t) / (alpha * noise)
        return Marginal(alpha, r, m, m, speed, speed * r / (r + alpha))


class MixingProcess(NoiseProcess):
    """Universal hybrid mixing (arXiv 2512.10858): s u + (1 - s) m with s = sigmoid(lambda + b).

    alpha = 1 - t, lambda = log((1 - t) / t). b = -inf is masked, b = inf uniform diffusion; between
    them noise is uniform at high signal-to-noise ratio and <mask> at low.
    """

    def __init__(self, space: TokenSpace, shift: float) -> None:
        super().__init__(space)
        self.shift = shift
        self.mask_only = shift == -math.inf

    def share(self, t: Tensor) -> Tensor:
        """Uniform share s of the noise."""
        if math.isinf(self.shift):
            return torch.full_like(t, float(self.shift > 0))
        tilt = math.exp(self.shift)
        return (1.0 - t) * tilt / ((1.0 - t) * tilt + t)

    def masses(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute 1 - t, t s / K and t (1 - s)."""
        s = self.share(t)
        return 1.0 - t, t * s / self.num_targets, t * (1.0 - s)

    def marginal(self, t: Tensor) -> Marginal:
        """Compute masses and weights: w_lambda is 1 + s, s and s r / (r + alpha), and
        |d lambda / dt| = 1 / (t (1 - t))."""
        alpha, r, m = self.masses(t)
        s = self.share(t)
        speed = 1.0 / (t * (1.0 - t))
        return Marginal(
            alpha, r, m, speed * torch.where(m > 0, 1.0 + s, 0.0), speed * s,
            speed * s * r / (r + alpha),
        )  # fmt: skip


class HybridProcess(NoiseProcess):
    """GIDD in time form (arXiv 2503.04482) with gamma = 1.

    q_t = ((1 - t) x + t m + c u) / (1 + c),  c = B sqrt(t (1 - t)),  B = 2 p_u / (1 - p_u)

    A share p_u of the noise is uniform at t = 1/2. Its mass goes as sqrt(t), so that clipping at
    t = 1e-4, as public code does, drops B / 100 times several nats.
    """

    spread = 3.0

    def __init__(self, space: TokenSpace, uniform_share: float) -> None:
        super().__init__(space)
        self.factor = 2.0 * uniform_share / (1.0 - uniform_share)
        self.mask_only = uniform_share == 0

    def masses(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compute (1 - t, c / K, t) / (1 + c)."""
        c = self.factor * torch.sqrt(t * (1.0 - t))
        return (1.0 - t) / (1.0 + c), c / (1.0 + c) / self.num_targets, t / (1.0 + c)

    def marginal(self, t: Tensor) -> Marginal:
        """Compute masses and weights: w is 1 / (t (1 - t)) for <mask>, half of it for other noise,
        and r / (r + alpha) of that half for x."""
        alpha, r, m = self.masses(t)
        speed = 1.0 / (t * (1.0 - t))
        noise = speed * (0.5 if self.factor > 0 else 0.0)
        return Marginal(alpha, r, m, speed, noise, noise * r / (r + alpha))
