"""Autoregressive language modelling: every token is predicted from the tokens before it.

    input  [<doc>] + x[:-1]     target  x     loss  -log p(x^l | x^<l)

All S positions are scored, so that every family is measured on the same tokens. Where documents are
kept apart, the separator that is shifted in belongs to the segment of the document after it: only
that document may attend to it.

Two augmentations of the data-constrained study (arXiv 2507.15857) are off by default and never used
in the likelihood. `orders`: each sequence is presented in one of N fixed orders. Rotary positions
stay those of the text. No input says which position comes next; that noise is part of the study.
`hide`: chosen queries miss each past token with a probability drawn for the query, or chosen tokens
are hidden from all later positions. A position always attends to itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pretrain.batch import AttentionKind, AttentionRule, CleanBatch, TrainBatch
from pretrain.config.objectives import AutoregressiveConfig
from pretrain.noise.key import NoiseKey
from pretrain.objectives.attention_order import NEVER
from pretrain.objectives.base import (
    Objective,
    position_in_segment,
    sequence_rows,
)

if TYPE_CHECKING:
    from pretrain.config.samplers import AncestralConfig
    from pretrain.module import ObjectiveModule
    from pretrain.sampling.sampler import Sampler


class Autoregressive(Objective):
    """Next-token prediction; the likelihood is exact."""

    config: AutoregressiveConfig

    exact_likelihood = True
    causal = True

    def attention_kinds(self, documents_apart: bool) -> tuple[AttentionKind, ...]:
        """Causal rules; tokens that are hidden in training need general columns."""
        kind: AttentionKind = "documents" if documents_apart else "causal"
        return (kind,) if self.config.hide == "none" else ("columns", kind)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Draw left to right, one token a forward pass."""
        from pretrain.sampling.autoregressive import sample_autoregressive
        from pretrain.sampling.sampler import Drawn, Sampler

        def draw(module: ObjectiveModule, prompt: Tensor, noise: NoiseKey, length: int) -> Drawn:
            return sample_autoregressive(
                module.model,
                prompt,
                noise,
                length=length,
                temperature=settings.temperature,
                top_p=settings.top_p,
            )

        return Sampler("autoregressive", draw, steps=False)

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Shift right; the augmentations are the only noise."""
        order = self._order(clean, noise) if self.config.orders > 1 else None
        hidden = self._hidden(clean, noise) if self.config.hide != "none" else None
        return self._batch(clean, order, hidden)

    def bound_batch(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Batch of the exact likelihood: left to right, without augmentation."""
        batch = self._batch(clean, None, None)
        return TrainBatch(**{**batch.__dict__, "weight": batch.weight.double()})

    def _batch(
        self, clean: CleanBatch, order: Tensor | None, hidden: tuple[Tensor, Tensor] | None
    ) -> TrainBatch:
        """Assemble the batch.

        `order` [b, s] is the position that is predicted at each place, `hidden` (hiding, salt).
        """
        b, s = clean.tokens.shape
        tokens, positions = clean.tokens, torch.arange(s)[None]
        if order is not None:
            tokens = tokens.gather(1, order)
            positions = torch.cat((torch.zeros(b, 1, dtype=torch.int64), order[:, :-1] + 1), dim=1)
        first = torch.full((b, 1), self.space.doc_id)
        shifted = torch.cat((first, tokens[:, :-1]), dim=1)
        if not clean.one_segment:
            positions = position_in_segment(clean.segment)
            shifted = torch.where(positions == 0, self.space.doc_id, shifted)
        if clean.one_segment and hidden is None:
            # Invalid positions come after all valid ones, which causal attention never sees.
            attention = AttentionRule("causal")
        elif hidden is None:
            attention = AttentionRule.from_documents(clean.segment, clean.valid, causal=True)
        else:
            attention = self._columns(clean, hidden)
        return TrainBatch(
            ids=shifted,
            positions=positions,
            attention=attention,
            noise_level=None,
            rows=None,
            # Pad has probability zero, and 0 weight times infinite loss would not be 0.
            targets=torch.where(clean.valid, tokens, self.space.doc_id).flatten(),
            weight=clean.valid.flatten().float(),
            sequence=sequence_rows(b, s),
        )

    def _columns(self, clean: CleanBatch, hidden: tuple[Tensor, Tensor]) -> AttentionRule:
        """Causal rule inside documents, without the hidden tokens."""
        place = torch.arange(clean.tokens.shape[1]).expand_as(clean.tokens)
        if self.config.hide == "tokens":
            key_rank = torch.where(hidden[0] > 0, NEVER, place)
            return AttentionRule.from_columns(clean.segment, place, place, key_rank)
        return AttentionRule.from_columns(clean.segment, place, place, place, hidden)

    def _order(self, clean: CleanBatch, noise: NoiseKey) -> Tensor:
        """Permutation of each sequence [b, s], one of N that are fixed for the whole run."""
        assert clean.one_segment, "refused together with documents kept apart"
        s, count = clean.tokens.shape[1], self.config.orders
        number = (noise.uniform("order", 1)[:, 0] * count).long()
        shared = noise.at(torch.arange(count))
        if self.config.order_kind == "local":
            scale = torch.arange(count, dtype=torch.float64)[:, None]
            keys = torch.arange(s) + scale * shared.normal("orders", s)
        else:
            keys = shared.fine_uniform("orders", s)
            keys[0] = torch.arange(s).double() / s
        chosen = torch.where(clean.valid, keys[number], torch.inf)
        return chosen.argsort(dim=1, stable=True)

    def _hidden(self, clean: CleanBatch, noise: NoiseKey) -> tuple[Tensor, Tensor]:
        """Columns (hiding, salt) of each position: probability times 2^31, and a keyed word."""
        s = clean.tokens.shape[1]
        chosen = noise.uniform("hide", s) < self.config.hide_share
        probability = noise.uniform("hide", s, draw=1)
        hiding = torch.where(chosen, (probability * 2.0**31).long(), 0)
        return hiding, noise.words("hide", s, draw=2) >> 1
