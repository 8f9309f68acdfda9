"""Uniform-state diffusion (UDLM, arXiv 2412.10193; Duo, arXiv 2506.10892).

    forward   each token is redrawn from the K allowed ids with probability 1 - alpha_t
    training  sum_l f(z, x)             `loss: elbo`, f = w_t D, the Rao-Blackwellised bound of Duo
              sum_(l redrawn) CE        `loss: simple`, head at the redrawn positions only
    bound     -log p(x) <= E_t sum_l f(z, x),   t spread towards 0

The minimiser of either loss is the leave-one-out predictive p(x^l | z^(-l)): if a token was
redrawn, z^l says nothing about x^l. So `simple` takes all redrawn tokens, also those that were
drawn equal to x; choosing them by z != x would train another target. A time-conditioned model is
conditioned on the noise level sigma = -log alpha, as those of the literature are.

`curriculum_sequences` softens the inputs of the first sequences of the run
(`pretrain.objectives.curriculum`). The evaluated bound is never softened.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import UniformConfig
from pretrain.noise.key import NoiseKey
from pretrain.noise.process import Marginal, UniformProcess
from pretrain.noise.schedule import SCHEDULES
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import (
    shorten,
)
from pretrain.objectives.curriculum import Curriculum, select_rows
from pretrain.objectives.interpolating import Noised, bound_weight
from pretrain.vocabulary import TokenSpace


class Uniform(Noised):
    """Uniform-state diffusion: any token can be noise and can be revised; there is no <mask>."""

    config: UniformConfig

    def __init__(self, config: UniformConfig, space: TokenSpace, static_rows: bool = False) -> None:
        super().__init__(config, space, static_rows)
        # The bound does not depend on the schedule; linear reaches both ends, so that none of its
        # terms is dropped.
        self.process = UniformProcess(space)
        self.training_process = UniformProcess(space, SCHEDULES[config.schedule])
        self.curriculum = Curriculum(config, space)
        self.scores_noised = config.loss == "simple"
        if self.scores_noised:
            self.head_share = self.training_process.mean_noise

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Redraw tokens; weights are those of the bound, or 1 at the redrawn positions."""
        clean = shorten(clean, noise, self.config.random_length, self.space.pad_id)
        t = stratified_time(noise, self.time_window)[:, None]
        marginal = self.training_process.marginal(t)
        z, redrawn = self.training_process.draw(clean.tokens, marginal, noise)
        if bool(self.curriculum.covers(clean.position).any()):
            return self._softened(clean, noise, t, z, marginal)
        if self.config.loss == "elbo":
            weight = bound_weight(clean, z, marginal, self).float()
            return self.assemble(clean, z, marginal, weight)
        return self.assemble_noised(clean, z, marginal, redrawn)

    def _softened(
        self, clean: CleanBatch, noise: NoiseKey, t: Tensor, z: Tensor, marginal: Marginal
    ) -> TrainBatch:
        """Mix embeddings in sequences that the curriculum covers; the others keep the tokens z."""
        early = self.curriculum.covers(clean.position)
        soft, soft_marginal = self.curriculum.draw(clean, t, noise)
        marginal = select_rows(early, soft_marginal, marginal)
        mixed = (early[:, None] & clean.valid)[..., None]
        z = torch.where(early[:, None], soft.ids[..., 0], z)
        weight = bound_weight(clean, z, marginal, self).float()
        batch = self.assemble(clean, z, marginal, weight)
        one = torch.zeros_like(soft.mix)
        one[..., 0] = 1.0
        return replace(
            batch,
            ids=torch.where(mixed, soft.ids, batch.ids[..., None]),
            mix=torch.where(mixed, soft.mix, one).float(),
        )
