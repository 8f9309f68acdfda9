"""Duo's Gaussian curriculum (arXiv 2506.10892, section 4; top-k form of arXiv 2602.21185).

For the first sequences of a run the input is sum_v softmax(w / tau)_v E_v instead of E_z, where w
is the Gaussian latent whose argmax is z. Everything else is as in the uniform family: the loss is
that of z under the noise schedule alpha = T(mu), and the network is conditioned on -log alpha. The
gradient is biased and has less variance. Time is uniform in the log-SNR of the Gaussian, over the
given interval of alpha.

The softening of a sequence is a function of its position in the run alone: there is no state to
save, and neither rank nor batch size matters.
"""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from pretrain.batch import CleanBatch
from pretrain.config.objectives import UniformConfig
from pretrain.errors import ConfigError
from pretrain.noise.duality import Duality, GaussianTime, duality_schedule
from pretrain.noise.key import NoiseKey
from pretrain.noise.latent import SoftTokens, soft_tokens
from pretrain.noise.process import Marginal, UniformProcess
from pretrain.vocabulary import TokenSpace


class Curriculum:
    """Softened inputs for the sequences before `curriculum_sequences`."""

    def __init__(self, config: UniformConfig, space: TokenSpace) -> None:
        self.length = config.curriculum_sequences
        if self.length == 0:
            return
        states = space.num_targets
        if config.curriculum_top_k >= states:
            raise ConfigError(
                f"objective.curriculum_top_k {config.curriculum_top_k} must be below the "
                f"{states} ids that a token can take"
            )
        self.top_k = config.curriculum_top_k
        self.temperature = config.curriculum_temperature
        interval = config.curriculum_interval
        self.time = GaussianTime.between(Duality(states), interval)
        self.process = UniformProcess(space, duality_schedule(states, interval))

    def covers(self, position: Tensor) -> Tensor:
        """True for the positions of the run that are softened, bool [b]."""
        return position < self.length

    def tau(self, position: Tensor) -> Tensor:
        """Temperature at positions [b], log-linear, float64 [b]."""
        first, last = torch.tensor(self.temperature, dtype=torch.float64).log()
        share = (position.double() / self.length).clamp(max=1.0)
        return (first + (last - first) * share).exp()

    def draw(self, clean: CleanBatch, t: Tensor, noise: NoiseKey) -> tuple[SoftTokens, Marginal]:
        """Draw softened tokens at t in (0, 1), float64 [b, 1]; and their argmax's marginal."""
        tau = self.tau(clean.position)[:, None]
        mu = self.time.signal(t)
        soft = soft_tokens(clean.tokens, self.process.allowed, mu, tau, self.top_k, noise)
        return soft, self.process.marginal(t)


def select_rows(which: Tensor, first: Marginal, second: Marginal) -> Marginal:
    """Rows of `first` where `which` [b] is True, else of `second`."""
    return Marginal(
        *(
            torch.where(which[:, None], getattr(first, field.name), getattr(second, field.name))
            for field in fields(Marginal)
        )
    )
