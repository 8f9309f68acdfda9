"""Interpolating diffusion (GIDD, arXiv 2503.04482; log-SNR form, arXiv 2512.10858).

    forward   z ~ alpha 1[x] + r 1[allowed] + m 1[<mask>], one t a sequence (or one a token)
    training  sum_l w_t(z, x) D(z, x)                     `loss: elbo`
              the same times t (1 - t)                    `loss: simple` (p(lambda) := 1)
              GIDD's weights in place of w                `loss: dynamic`
              sum_(l noised) CE                           `loss: cross_entropy`
    bound     -log p(x) <= E_t sum_l w_t(z, x) D(z, x),   t spread towards 0

D is in `pretrain.objectives.divergence`, the masses alpha, r, m and the weights w in
`pretrain.noise.process`. Every position is scored, also those whose token was not changed, unless
the noise is <mask> alone.

A batch is made in four steps, the same for the uniform family, which also derives from `Noised`:

    1. draw t                  stratified; for the bound spread towards 0, with its Jacobian
    2. marginal(t)             the masses and weights at t, [b, 1] or [b, s]
    3. draw(tokens, marginal)  z, and which tokens were replaced by noise
    4. assemble                z as input; targets, weights and D's arguments at the scored rows

`cross_entropy` extends `simple` of masked and uniform diffusion to any noise: plain cross-entropy,
the head at the noised positions only. If a token was replaced by noise, z^l says nothing about x^l.
So the minimiser is that of the bound, though the weights are not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import InterpolatingConfig
from pretrain.noise.key import NoiseKey
from pretrain.noise.process import HybridProcess, Marginal, MixingProcess, NoiseProcess
from pretrain.noise.time import spread_time, stratified_time, stratified_times
from pretrain.objectives.base import (
    Objective,
    document_positions,
    head_rows,
    sequence_rows,
    shorten,
    visible_attention,
)
from pretrain.objectives.divergence import divergence
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.model.vocab import VocabChunk
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler

SHIFTS = {
    "masked": -torch.inf,
    "low_uniform": -2.0,
    "balanced": 0.0,
    "high_uniform": 2.0,
    "uniform": torch.inf,
}
"""Shift b of the universal hybrid mixing for each name."""


class Noised(Objective):
    """Base of uniform and interpolating diffusion: a noise process and its bound at every token."""

    process: NoiseProcess
    revises_tokens = True
    scores_noised: bool = False
    """True where training takes cross-entropy at noised positions in place of the bound."""

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw by ancestral steps of the noise process."""
        from pretrain.sampling.interpolating import sample_interpolating
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            return sample_interpolating(
                module.model,
                self.process,
                prompt,
                noise,
                steps=settings.steps or length,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
                greedy_tail=settings.greedy_tail,
            )

        return Sampler("ancestral", draw)

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Noise each sequence at one level, spread towards the clean end; float64 weights."""
        u = stratified_time(noise, self.time_window)[:, None]
        t, jacobian = spread_time(u, self.process.spread)
        marginal = self.process.marginal(t)
        z, _ = self.process.draw(clean.tokens, marginal, noise)
        return self.assemble(clean, z, marginal, bound_weight(clean, z, marginal, self) * jacobian)

    def token_loss(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """KL and Itakura-Saito divergence of the noised predictions, or cross-entropy."""
        if self.scores_noised:
            return chunk.cross_entropy(targets)
        return divergence(chunk, targets, extra).float()

    def token_bound(self, chunk: VocabChunk, targets: Tensor, extra: dict[str, Tensor]) -> Tensor:
        """Divergence D in float64, also where training takes cross-entropy."""
        return divergence(chunk, targets, extra)

    def assemble(
        self, clean: CleanBatch, z: Tensor, marginal: Marginal, weight: Tensor
    ) -> TrainBatch:
        """Assemble the batch of noisy tokens z [b, s] and weights [b, s], scored by D.

        z at invalid positions is ignored.
        """
        b, s = z.shape
        z = torch.where(clean.valid, z, clean.tokens)
        masked = z == self.space.mask_id
        doc = self.space.doc_id
        everywhere = not self.process.mask_only  # with <mask> alone D is 0 at visible tokens
        rows = head_rows(masked | everywhere, self.static_rows)
        targets = rows.take(torch.where(clean.valid, clean.tokens, doc), doc).long()
        is_mask = rows.take(masked, False)
        noisy = rows.take(torch.where(clean.valid, z, doc), doc).long()
        return TrainBatch(
            ids=z,
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=_noise_level(marginal),
            rows=None if everywhere else rows.index,
            targets=targets,
            weight=rows.take(torch.where(clean.valid, weight, 0.0), 0.0),
            sequence=sequence_rows(b, s)[rows.index],
            extra={
                # <mask> has no probability to look up; the target stands in for it.
                "noisy": torch.where(is_mask, targets, noisy),
                "noisy_is_mask": is_mask,
                "alpha": marginal.alpha.expand(b, s).flatten()[rows.index],
                "uniform": marginal.uniform.expand(b, s).flatten()[rows.index],
            },
        )

    def assemble_noised(
        self, clean: CleanBatch, z: Tensor, marginal: Marginal, noised: Tensor
    ) -> TrainBatch:
        """Assemble the batch whose `noised` [b, s] and valid positions are scored, all alike.

        A noised token that was drawn equal to x counts too: to choose by z != x would train another
        target.
        """
        rows = head_rows(noised & clean.valid, self.static_rows)
        return TrainBatch(
            ids=torch.where(clean.valid, z, clean.tokens),
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=_noise_level(marginal),
            rows=rows.index,
            targets=rows.take(clean.tokens, self.space.doc_id).long(),
            weight=rows.real.float(),
            sequence=rows.index // clean.tokens.shape[1],
        )


def _noise_level(marginal: Marginal) -> Tensor | None:
    """Level sigma = -log alpha, float32 [b]; None where each token has a separate level."""
    return -marginal.alpha[:, 0].log().float() if marginal.alpha.shape[1] == 1 else None


def bound_weight(clean: CleanBatch, z: Tensor, marginal: Marginal, family: Noised) -> Tensor:
    """Weight w_t(z, x) of each token, float64 [b, s]."""
    other = torch.where(z == clean.tokens, marginal.clean_weight, marginal.noise_weight)
    return torch.where(z == family.space.mask_id, marginal.mask_weight, other)


class Interpolating(Noised):
    """Mixture of mask and uniform noise, whose proportions depend on the signal-to-noise ratio."""

    config: InterpolatingConfig

    def __init__(
        self, config: InterpolatingConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        super().__init__(config, space, static_rows)
        self.process = build_process(config, space)
        self.scores_noised = config.loss == "cross_entropy"
        if self.process.mask_only or self.scores_noised:
            self.head_share = self.process.mean_noise

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Noise every valid token; the weights follow `objective.loss`."""
        clean = shorten(clean, noise, self.config.random_length, self.space.pad_id)
        t = self._times(noise, clean.tokens.shape[1])
        marginal = self.process.marginal(t)
        z, redrawn = self.process.draw(clean.tokens, marginal, noise)
        if self.scores_noised:
            return self.assemble_noised(clean, z, marginal, redrawn | (z == self.space.mask_id))
        weight = bound_weight(clean, z, marginal, self)
        if self.config.loss == "simple":
            weight = weight * (t * (1.0 - t))
        elif self.config.loss == "dynamic":
            weight = self._dynamic_weight(clean, z, marginal)
        return self.assemble(clean, z, marginal, weight.float())

    def _times(self, noise: NoiseKey, length: int) -> Tensor:
        """Times t [b, 1], or [b, s] where some sequences have a level for each token."""
        t = stratified_time(noise, self.time_window)[:, None]
        if self.config.independent_levels == 0:
            return t
        independent = noise.uniform("independent", 1) < self.config.independent_levels
        return torch.where(independent, stratified_times(noise, self.time_window, length), t)

    def _dynamic_weight(self, clean: CleanBatch, z: Tensor, marginal: Marginal) -> Tensor:
        """Weights of GIDD's eq. 15 with w_max = 1.

        They are 2 for <mask>, 1 for noise and (B/N) e^(-lambda/2) for x, clamped to 2. The released
        code (since May 2025) has sigmoid(-t) in place of -lambda. `simple` has the exact ratios
        instead: 1, 1/2 and 1/2 r / (r + alpha).
        """
        assert isinstance(self.process, HybridProcess)
        odds = (1.0 - marginal.alpha) / marginal.alpha
        clean_weight = self.process.factor / (self.space.num_targets + 1) * odds.sqrt()
        weight = torch.where(z == clean.tokens, clean_weight.clamp(max=2.0), 1.0)
        return torch.where(z == self.space.mask_id, 2.0, weight)


def build_process(config: InterpolatingConfig, space: TokenSpace) -> NoiseProcess:
    """Build the noise process that `config.noise` names."""
    if config.noise == "hybrid":
        return HybridProcess(space, config.uniform_share)
    return MixingProcess(space, SHIFTS[config.noise])
