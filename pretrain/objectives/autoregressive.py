"""Autoregressive: x0 read left to right, every position scored.

    input  [<doc>] + x[:-1]     target  x     loss  -log p(x^l | x^<l)

All S positions are scored, so that every family is measured on the same tokens. Where documents are
kept apart, the shifted-in separator opens the next segment: it is the token before a document's
first, and must be readable by that document alone.

Two augmentations of the data-constrained study (arXiv 2507.15857), off by default and never used
in the likelihood. `orders`: each sequence is read in one of N fixed orders; rotary positions stay
those of the text and nothing tells which position comes next, an inherent noise of that study.
`hide`: chosen queries miss each past token with a probability of their own, or chosen tokens are
hidden from everything after them; a position always reads itself.
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
        """Causal; what is hidden while training needs general columns."""
        kind: AttentionKind = "documents" if documents_apart else "causal"
        return (kind,) if self.config.hide == "none" else ("columns", kind)

    def sampler(self, settings: AncestralConfig) -> Sampler:
        """Left to right, one token a pass."""
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
        """The likelihood, left to right and without augmentation."""
        batch = self._batch(clean, None, None)
        return TrainBatch(**{**batch.__dict__, "weight": batch.weight.double()})

    def _batch(
        self, clean: CleanBatch, order: Tensor | None, hidden: tuple[Tensor, Tensor] | None
    ) -> TrainBatch:
        """`order` [b, s]: which position is predicted at each place; `hidden`: (hiding, salt)."""
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
            # Invalid positions lie behind all valid ones, where causal attention never looks.
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
        """Causal inside documents, less what is hidden."""
        place = torch.arange(clean.tokens.shape[1]).expand_as(clean.tokens)
        if self.config.hide == "tokens":
            write = torch.where(hidden[0] > 0, NEVER, place)
            return AttentionRule.from_columns(clean.segment, place, place, write)
        return AttentionRule.from_columns(clean.segment, place, place, place, hidden)

    def _order(self, clean: CleanBatch, noise: NoiseKey) -> Tensor:
        """Permutation of each sequence, one of N that are the same in the whole run, [b, s]."""
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
        """(hiding, salt) of each position: probability times 2^31 and a keyed word."""
        s = clean.tokens.shape[1]
        chosen = noise.uniform("hide", s) < self.config.hide_share
        probability = noise.uniform("hide", s, draw=1)
        hiding = torch.where(chosen, (probability * 2.0**31).long(), 0)
        return hiding, noise.words("hide", s, draw=2) >> 1
