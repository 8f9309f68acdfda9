"""Masked diffusion (MDLM, arXiv 2406.07524; LLaDA, arXiv 2502.09992): absorb, then fill in.

    forward   each valid token becomes <mask> with probability t, t stratified over the run
    training  sum over masked of CE / t   (`loss: elbo`)   or   of CE   (`loss: simple`)
    bound     -log p(x) <= E_t sum_masked CE / t
                        =  E_m (L / m) sum over a random set M, |M| = m, of CE,   m uniform on 1..L

The bound is evaluated in the second form (fixed count): exact, no term at t = 0 or t = 1 is
dropped, and its variance lacks the part that comes from the number of masked tokens.

The head is evaluated at masked positions only. `simple` is a different objective on another scale;
it is never a likelihood (arXiv 2602.15014 finds it about 12 % more compute-efficient).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.noise.key import NoiseKey
from pretrain.noise.schedule import LINEAR
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import (
    Objective,
    document_positions,
    register,
    visible_attention,
)


@register("masked")
class Masked(Objective):
    """Absorbing-state diffusion with the linear schedule alpha_t = 1 - t."""

    head_share = 0.5
    settings = frozenset({"loss"})

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask each valid token independently with probability t."""
        t = stratified_time(noise, self.time_window)
        mask = (noise.uniform("mask", clean.tokens.shape[1]) < t[:, None]) & clean.valid
        weight = LINEAR.elbo_weight(t) if self.config.loss == "elbo" else torch.ones_like(t)
        return self._batch(clean, mask, weight.float())

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Mask exactly m valid tokens, m stratified over 1..L; weight L / m in float64."""
        t = stratified_time(noise, self.time_window)
        length = clean.valid.sum(dim=1)
        count = torch.minimum((t * length).long() + 1, length)
        score = noise.fine_uniform("mask", clean.tokens.shape[1])
        score = torch.where(clean.valid, score, torch.inf)
        rank = score.argsort(dim=1).argsort(dim=1)
        mask = (rank < count[:, None]) & clean.valid
        return self._batch(clean, mask, length.double() / count.clamp(min=1))

    def _batch(self, clean: CleanBatch, mask: Tensor, weight: Tensor) -> TrainBatch:
        """Assemble the batch for masked positions `mask` [b, s] and weights of sequences [b]."""
        s = clean.tokens.shape[1]
        rows = mask.flatten().nonzero()[:, 0]
        targets = clean.tokens.flatten()[rows]
        if not len(rows):  # a head needs at least one row; it counts nothing
            rows, weight = torch.zeros(1, dtype=torch.int64), torch.zeros_like(weight)
            targets = torch.full_like(rows, self.space.doc_id)
        sequence = rows // s
        return TrainBatch(
            ids=torch.where(mask, self.space.mask_id, clean.tokens),
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=None,
            rows=rows,
            targets=targets,
            weight=weight[sequence],
            sequence=sequence,
        )
