"""Discrete consistency distillation of a uniform-state model (Duo, arXiv 2506.10892, section 5).

    pair      z_s and z_t of the same tokens with the same noise, s = t - delta
    training  sum_l KL(x_theta(z_t, t) || x_teacher(z_s, s))       `divergence: reverse`
    delta     `first_gap` 2^round; at the start of a round the student becomes the teacher
    bound     as of the uniform family

What makes the pair a deterministic path is that both ends share their noise. In the Gaussian latent
w = a x + s eps a token is x until one level, which depends on eps alone, and the same other token
after it. That is the law of `NoiseProcess.draw` with equal keys at two levels: a token is x until
its uniform says otherwise, and then one fixed id. So no Gaussian is drawn here; only the times keep
the Gaussian's clock, even in its log-SNR over `gap_interval`.

Train it from a trained uniform model. The teacher is the student's raw weights, not an average of
them; evaluate the average (`train.ema_decay`), which is what the literature reports.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.batch import CleanBatch, TrainBatch
from pretrain.config.objectives import DistillationConfig
from pretrain.noise.duality import duality_schedule
from pretrain.noise.key import NoiseKey
from pretrain.noise.process import UniformProcess
from pretrain.noise.time import stratified_time
from pretrain.objectives.base import (
    document_positions,
    sequence_rows,
    visible_attention,
)
from pretrain.objectives.interpolating import Noised
from pretrain.vocabulary import TokenSpace

if TYPE_CHECKING:
    from pretrain.model.vocab import VocabChunk


class Distillation(Noised):
    """The student at a noisier level learns what its former self says at a cleaner one."""

    config: DistillationConfig

    extra_passes = 1.0

    def __init__(
        self, config: DistillationConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        super().__init__(config, space, static_rows)
        self.process = UniformProcess(space)
        schedule = duality_schedule(space.num_targets, config.gap_interval)
        self.training_process = UniformProcess(space, schedule)
        self._taught = -1

    def gap(self, position: Tensor) -> Tensor:
        """delta at positions of the run [b]: doubles every round up to 1, float64 [b]."""
        rounds = (position // self.config.round_sequences).clamp(max=64).double()
        return (self.config.first_gap * 2.0**rounds).clamp(max=1.0)

    def begins_round(self, position: int) -> bool:
        """Whether the teacher of the round at `position` is still to be made, once a round."""
        current = position // self.config.round_sequences
        begins = current != self._taught
        self._taught = current
        return begins

    @property
    def state(self) -> dict[str, Any]:
        """Which round the teacher in the checkpoint belongs to."""
        return {"round": self._taught}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on in the middle of a round with its teacher."""
        self._taught = int(state["round"])

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Two levels of one draw of noise: the student's in `ids`, the teacher's in `teacher`."""
        gap = self.gap(clean.position)[:, None]
        t = (stratified_time(noise, self.time_window)[:, None] + gap).clamp(max=1.0)
        process, b, s = self.training_process, *clean.tokens.shape
        read = []
        for time in (t, t - gap):
            marginal = process.marginal(time)
            z, _ = process.draw(clean.tokens, marginal, noise)
            level = -marginal.alpha[:, 0].log().float()
            read.append((torch.where(clean.valid, z, clean.tokens), level))
        (later, level), (earlier, teacher_level) = read
        return TrainBatch(
            ids=later,
            positions=document_positions(clean),
            attention=visible_attention(clean),
            noise_level=level,
            rows=None,
            targets=torch.where(clean.valid, clean.tokens, self.space.doc_id).flatten(),
            weight=clean.valid.flatten().float(),
            sequence=sequence_rows(b, s),
            teacher={"ids": earlier, "noise_level": teacher_level},
        )

    def teacher_loss(self, chunk: VocabChunk, taught: VocabChunk) -> Tensor:
        """KL of each position, over the whole vocabulary."""
        return chunk.divergence_from(taught, reverse=self.config.divergence == "reverse")
