"""Autoregressive: x0 read left to right, every position scored.

    input  [<doc>] + x[:-1]     target  x     loss  -log p(x^l | x^<l)

All S positions are scored, so that every family is measured on the same tokens. Where documents are
kept apart, the shifted-in separator opens the next segment: it is the token before a document's
first, and must be readable by that document alone.
"""

from __future__ import annotations

import torch

from pretrain.batch import AttentionRule, CleanBatch, TrainBatch
from pretrain.noise.key import NoiseKey
from pretrain.objectives.base import Objective, position_in_segment, register, sequence_rows


@register("autoregressive")
class Autoregressive(Objective):
    """Next-token prediction; the likelihood is exact."""

    exact_likelihood = True
    causal = True

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Shift right; there is no noise."""
        b, s = clean.tokens.shape
        first = torch.full((b, 1), self.space.doc_id)
        shifted = torch.cat((first, clean.tokens[:, :-1]), dim=1)
        if clean.one_segment:
            # Invalid positions lie behind all valid ones, where causal attention never looks.
            attention, positions = AttentionRule("causal"), torch.arange(s)[None]
        else:
            positions = position_in_segment(clean.segment)
            starts = positions == 0
            shifted = torch.where(starts, self.space.doc_id, shifted)
            order = torch.arange(s).expand(b, s)
            attention = AttentionRule.from_columns(clean.segment, order, order, order)
        return TrainBatch(
            ids=shifted,
            positions=positions,
            attention=attention,
            noise_level=None,
            rows=None,
            # Pad has probability zero, and 0 weight times infinite loss would not be 0.
            targets=torch.where(clean.valid, clean.tokens, self.space.doc_id).flatten(),
            weight=clean.valid.flatten().float(),
            sequence=sequence_rows(b, s),
        )
