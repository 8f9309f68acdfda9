"""Eso-LM (arXiv 2506.01928, variant B): masked diffusion down to alpha_0, then left to right.

    diffusion    alpha_t = alpha_0 (1 - t): visible tokens first in random order, then masks in
                 random order, attention causal in that order (clean keys can be cached)
    sequential   z_0 keeps each token with probability alpha_0; the others are filled left to right,
                 each attends to the visible ones and to those before it: [z_0 | x], a pair in that
                 order
    bound        E_z0 sum_masked CE  +  E_t alpha_0 / (1 - alpha_t) sum_masked CE

alpha_0 = 1 is masked diffusion under shuffled causal attention, alpha_0 = 0 is autoregressive. In
between, a share of the sequences trains the diffusion term and the others the sequential one, each
weighted by one over its share. All rows have 2 S positions then; half of a diffusion row is unused.
The bound computes both terms of every sequence, in one row of 3 S positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.batch import AttentionKind, CleanBatch, TrainBatch
from pretrain.config.objectives import EsotericConfig
from pretrain.noise.key import NoiseKey
from pretrain.noise.time import stratified_time
from pretrain.objectives.attention_order import (
    Columns,
    concatenate,
    isolated,
    ordered,
    pair,
    select_rows,
)
from pretrain.objectives.base import (
    Objective,
    document_positions,
    fixed_count,
    head_rows,
)
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler


class Esoteric(Objective):
    """Autoregressive and masked diffusion in one network."""

    config: EsotericConfig

    def __init__(
        self, config: EsotericConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        super().__init__(config, space, static_rows)
        self.alpha0 = config.alpha0
        self.share = {0.0: 0.0, 1.0: 1.0}.get(self.alpha0, config.diffusion_share)
        self.exact_likelihood = self.alpha0 == 0
        self.positions_per_token = 1.0 if self.alpha0 == 1 else 2.0
        mean_noise = 1.0 - self.alpha0 / 2
        self.head_share = self.share * mean_noise + (1 - self.share) * (1 - self.alpha0)

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Columns for every batch."""
        return ("columns",)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw a share of the tokens by diffusion, the rest left to right."""
        from pretrain.sampling.ordered import sample_esoteric
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            return sample_esoteric(
                module.model,
                prompt,
                noise,
                alpha0=self.alpha0,
                steps=settings.steps or length,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )

        return Sampler("esoteric", draw)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Noise each sequence for one of the two phases, chosen by a stratified draw."""
        p = self._noise(noise)
        u = noise.uniform("mask", clean.tokens.shape[1])
        masked, left = (u < p) & clean.valid, (u < 1.0 - self.alpha0) & clean.valid
        diffusion = ordered(clean, self._order(clean, masked, noise, natural=False))
        weight = self.alpha0 / p if self.config.loss == "elbo" else torch.ones_like(p)
        if self.alpha0 == 1:
            return self._batch(clean, [(masked, weight.float())], diffusion)
        sequential = pair(clean, self._order(clean, left, noise, natural=True))
        one = torch.ones_like(p, dtype=torch.float32)
        if self.alpha0 == 0:
            return self._batch(clean, [(left, one), None], sequential)
        phase = stratified_time(noise, self.time_window, "phase") < self.share
        chosen = phase[:, None]
        weight = torch.where(chosen, weight / self.share, 1.0 / (1.0 - self.share)).float()
        columns = select_rows(phase, concatenate(diffusion, isolated(diffusion)), sequential)
        return self._batch(clean, [(torch.where(chosen, masked, left), weight), None], columns)

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Put both terms of a sequence side by side; with alpha_0 = 1 mask a fixed count."""
        length = clean.tokens.shape[1]
        if self.alpha0 == 1:
            masked, weight = fixed_count(clean, noise, self.time_window)
            columns = ordered(clean, self._order(clean, masked, noise, natural=False))
            return self._batch(clean, [(masked, weight[:, None])], columns)
        left = (noise.uniform("mask", length, draw=1) < 1.0 - self.alpha0) & clean.valid
        sequential = pair(clean, self._order(clean, left, noise, natural=True))
        one = torch.ones(len(left), 1, dtype=torch.float64)
        if self.alpha0 == 0:
            return self._batch(clean, [(left, one), None], sequential)
        p = self._noise(noise)
        masked = (noise.uniform("mask", length) < p) & clean.valid
        diffusion = ordered(clean, self._order(clean, masked, noise, natural=False))
        parts = [(masked, self.alpha0 / p), (left, one), None]
        return self._batch(clean, parts, concatenate(diffusion, sequential))

    def _noise(self, noise: NoiseKey) -> Tensor:
        """Masking probability 1 - alpha_t for a stratified t, float64 [b, 1]."""
        t = stratified_time(noise, self.time_window)[:, None]
        return 1.0 - self.alpha0 * (1.0 - t)

    def _order(
        self, clean: CleanBatch, masked: Tensor, noise: NoiseKey, *, natural: bool
    ) -> Tensor:
        """Rank of each position: visible ones in random order, then the masked ones.

        The masked ones are in text order where `natural`, else in random order.
        """
        length = masked.shape[1]
        key = noise.fine_uniform("order", length)
        if natural:
            key = torch.where(masked, (torch.arange(length) / length).double(), key)
        # Keys of visible positions are below 1, of masked ones from 1 on; invalid ones come last.
        key = torch.where(clean.valid, key + masked.double(), torch.inf)
        return key.argsort(dim=1, stable=True).argsort(dim=1)

    def _batch(
        self, clean: CleanBatch, parts: Sequence[tuple[Tensor, Tensor] | None], columns: Columns
    ) -> TrainBatch:
        """Assemble rows of one or more copies of each sequence.

        A part is (masked [b, s], weight [b, 1]) of one copy, or None for a clean copy.
        """
        nothing = torch.zeros_like(clean.valid)
        mask = torch.cat([nothing if p is None else p[0] for p in parts], dim=1)
        weights = [nothing.float() if p is None else p[1].expand_as(nothing) for p in parts]
        tokens = clean.tokens.repeat(1, len(parts))
        rows = head_rows(mask, self.static_rows)
        return TrainBatch(
            ids=torch.where(mask, self.space.mask_id, tokens),
            positions=document_positions(clean).repeat(1, len(parts)),
            attention=columns.rule(),
            noise_level=None,
            rows=rows.index,
            targets=rows.take(tokens, self.space.doc_id),
            weight=rows.take(torch.cat(weights, dim=1), 0.0),
            sequence=rows.index // mask.shape[1],
        )
