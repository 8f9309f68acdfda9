"""Gaussian diffusion over learned embeddings (Plaid, arXiv 2305.18619).

    forward   z_t = alpha_t E[x] + sigma_t eps,    gamma(t) = log(sigma_t^2 / alpha_t^2) is learned
    bound     -log p(x) <=  -log p(x | z_0)                                    reconstruction
                          + E_t 1/2 e^(-gamma) gamma' |E[x] - m(z_t, t)|^2     diffusion
                          + KL(N(alpha_1 E[x], sigma_1^2) || N(0, 1))          prior
    training  the bound; a sequence trains either its reconstruction or its diffusion at one t

m = sum_v p_v E[v] is the mean embedding under the distribution that the network predicts, so that
one softmax serves both terms. The minimiser of the bound is the posterior p(x^l | z), where z
includes the noisy point of token l, unlike with uniform noise over ids.

With self-conditioning a first pass without gradient computes m, and the second pass has it as an
additional input. The bound always uses two passes, unless `self_conditioning` is 0. The network is
in `pretrain.model.embedding_diffusion`, the schedule in `pretrain.noise.learned`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.model import ModelConfig
from pretrain.config.objectives import GaussianConfig
from pretrain.model.size import LEVEL_FREQUENCIES
from pretrain.noise.key import NoiseKey
from pretrain.noise.learned import UNITS
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import (
    Objective,
    document_positions,
    sequence_rows,
    shorten,
    visible_attention,
)
from pretrain.objectives.network_size import AuxiliaryNetwork, embedding_diffusion
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.model.transformer import Transformer
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler


class Gaussian(Objective):
    """Gaussian diffusion of token embeddings, at all positions at once."""

    config: GaussianConfig

    bound_parts = ("reconstruction", "diffusion", "prior")

    def __init__(
        self, config: GaussianConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        super().__init__(config, space, static_rows)
        self.extra_passes = config.self_conditioning

    def auxiliary_network(self, model: Transformer, seed: int) -> Any:
        """Embeddings, noise schedule and input projections of the transformer."""
        from pretrain.model.embedding_diffusion import EmbeddingDiffusion

        return EmbeddingDiffusion(model, self.config.embedding_size, self.config.end_points, seed)

    def auxiliary_size(self, model: ModelConfig, padded_vocab_size: int) -> AuxiliaryNetwork:
        """Numbers of `EmbeddingDiffusion`."""
        return embedding_diffusion(
            model.hidden_size,
            padded_vocab_size,
            self.config.embedding_size,
            LEVEL_FREQUENCIES,
            UNITS,
        )

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw by ancestral steps of the embeddings."""
        from pretrain.sampling.gaussian import sample_gaussian
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            return sample_gaussian(
                module.model,
                module.own,
                prompt,
                noise,
                self_conditioning=self.config.self_conditioning > 0,
                steps=settings.steps or length,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )

        return Sampler("ancestral", draw)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Draw eps and t; a share of the sequences takes t = 0 and trains the reconstruction.

        Weights are one over the share, so that the expectation is the bound.
        """
        clean = shorten(clean, noise, self.config.random_length, self.space.pad_id)
        share, window = self.config.reconstruction_share, self.time_window
        u = stratified_time(noise, window)
        at_zero = u < share
        time = torch.where(at_zero, 0.0, (u - share) / (1.0 - share))
        never = torch.zeros_like(time)
        terms = torch.stack(
            (
                torch.where(at_zero, 1.0 / share, never),
                torch.where(at_zero, never, 1.0 / (1.0 - share)),
                torch.ones_like(time),
            ),
            dim=1,
        )
        conditioned = stratified_time(noise, window, "condition") < self.config.self_conditioning
        return self._assemble(clean, self._normal(clean, noise, 0), time, terms, conditioned)

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Make two rows of each sequence: all sequences at t = 0, then all at a stratified t."""
        b = len(clean.tokens)
        twice = replace(
            clean,
            tokens=clean.tokens.repeat(2, 1),
            position=clean.position.repeat(2),
            segment=clean.segment.repeat(2, 1),
            valid=clean.valid.repeat(2, 1),
        )
        eps = torch.cat([self._normal(clean, noise, draw) for draw in range(2)])
        t = stratified_time(noise, self.time_window)
        time = torch.cat((torch.zeros_like(t), t))
        terms = torch.zeros(2 * b, 3, dtype=torch.float64)
        terms[:b, 0] = terms[b:, 1] = terms[:b, 2] = 1.0
        conditioned = torch.full((2 * b,), self.config.self_conditioning > 0)
        batch = self._assemble(twice, eps, time, terms, conditioned)
        return replace(batch, weight=batch.weight.double())

    def _normal(self, clean: CleanBatch, noise: NoiseKey, draw: int) -> Tensor:
        """Draw eps, float64 [b, s, d]; an element is keyed by its sequence and its place."""
        b, s = clean.tokens.shape
        size = self.config.embedding_size
        return noise.normal("gaussian", s * size, draw).view(b, s, size)

    def _assemble(
        self, clean: CleanBatch, eps: Tensor, time: Tensor, terms: Tensor, conditioned: Tensor
    ) -> TrainBatch:
        """Assemble a batch of the clean tokens, whose embeddings the network noises.

        time [b]; terms [b, 3], the factors of the three terms of the bound; conditioned, bool [b].
        """
        b, s = clean.tokens.shape
        auxiliary: dict[str, Any] = {
            "normal": eps,
            "time": time,
            "terms": terms,
            "conditioned": conditioned,
        }
        if self.config.self_conditioning > 0:
            index = conditioned.nonzero()[:, 0]
            if not len(index):  # ZeRO 3 needs equally many passes on every rank: one that is unused
                index = torch.zeros(1, dtype=torch.int64)
            part = replace(
                clean,
                tokens=clean.tokens[index],
                position=clean.position[index],
                segment=clean.segment[index],
                valid=clean.valid[index],
            )
            auxiliary |= {"first_pass": index, "first_rule": visible_attention(part)}
        return TrainBatch(
            ids=clean.tokens,
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=None,
            rows=None,
            targets=torch.where(clean.valid, clean.tokens, self.space.doc_id).flatten(),
            weight=clean.valid.flatten().float(),
            sequence=sequence_rows(b, s),
            auxiliary=auxiliary,
        )
