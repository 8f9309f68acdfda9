"""Masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992).

    forward   each valid token becomes <mask> with probability 1 - alpha_t, t stratified
    training  sum over masked of -alpha'/(1 - alpha) CE     `loss: elbo` (CE / t where linear)
              sum over masked of CE                         `loss: simple`
    bound     -log p(x) <= E_t sum_masked CE / t
                        =  E_m (L / m) sum over a random set M, |M| = m, of CE,   m uniform on 1..L

The bound is evaluated in the second form, with a fixed count of masks. It is exact: no term at
t = 0 or t = 1 is dropped, and the schedule does not enter it. The number of masked tokens adds no
variance.

The head is evaluated at masked positions only. `simple` is a different objective on another scale;
it is never a likelihood (arXiv 2602.15014 finds it about 12 % more compute-efficient). `ar_ratio`
moves the masks of a share of the sequences to their end, as in left-to-right continuation
(arXiv 2507.15857). The weights of these sequences do not change, so that this is not the bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import MaskedConfig
from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import SCHEDULES
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import (
    Objective,
    document_positions,
    fixed_count,
    head_rows,
    shorten,
    visible_attention,
)
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler


class Masked(Objective):
    """Absorbing-state diffusion."""

    config: MaskedConfig

    def __init__(self, config: MaskedConfig, space: TokenSpace, static_rows: bool = False) -> None:
        super().__init__(config, space, static_rows)
        self.schedule = SCHEDULES[config.schedule]
        self.head_share = self.schedule.mean_noise

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw by ancestral unmasking over a grid of noise levels."""
        from pretrain.sampling.masked import sample_masked
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            return sample_masked(
                module.model,
                prompt,
                noise,
                steps=settings.steps or length,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )

        return Sampler("ancestral", draw)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask each valid token independently with probability 1 - alpha_t."""
        clean = shorten(clean, noise, self.config.random_length, self.space.pad_id)
        t = stratified_time(noise, self.time_window)
        u = noise.uniform("mask", clean.tokens.shape[1])
        mask = (u < self.schedule.noise(t)[:, None]) & clean.valid
        if self.config.ar_ratio > 0:
            suffix = noise.uniform("ar_ratio", 1) < self.config.ar_ratio
            visible = clean.valid.sum(dim=1) - mask.sum(dim=1)
            place = clean.valid.cumsum(dim=1)  # 1-based among valid positions
            mask = torch.where(suffix, (place > visible[:, None]) & clean.valid, mask)
        weight = torch.ones_like(t)
        if self.config.loss == "elbo":
            weight = self.schedule.elbo_weight(t)
        return self._batch(clean, mask, weight.float())

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask exactly m valid tokens, m stratified over 1..L; weight L / m in float64."""
        mask, weight = fixed_count(clean, noise, self.time_window)
        return self._batch(clean, mask, weight)

    def _batch(self, clean: CleanBatch, mask: Tensor, weight: Tensor) -> TrainBatch:
        """Assemble the batch of masked positions `mask` [b, s] and weights of sequences [b]."""
        rows = head_rows(mask, self.static_rows)
        return TrainBatch(
            ids=torch.where(mask, self.space.mask_id, clean.tokens),
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=None,
            rows=rows.index,
            targets=rows.take(clean.tokens, self.space.doc_id),
            weight=rows.take(weight[:, None].expand_as(mask), 0.0),
            sequence=rows.index // mask.shape[1],
        )
