"""Discrete consistency distillation of a uniform-state model (Duo, arXiv 2506.10892, section 5).

    pair      z_s and z_t of the same tokens with the same noise, s = t - delta
    training  sum_l KL(x_theta(z_t, t) || x_teacher(z_s, s))       `divergence: reverse`
    delta     `first_gap` 2^round; at the start of a round the student becomes the teacher
    bound     as of the uniform family

The pair is a deterministic path, because both ends share their noise. In the Gaussian latent
w = a x + s eps the argmax is x up to one noise level, which depends on eps alone, and one fixed
other token above it. `NoiseProcess.draw` with equal keys at two levels has the same distribution: a
token is x up to the level that its uniform sets, and one fixed id above it. So no Gaussian is drawn
here. Only the times are those of the Gaussian: uniform in its log-SNR over `gap_interval`.

Train it from a trained uniform model. The teacher has the student's raw weights, not an average of
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
    """Student at a noisier level that learns its earlier predictions at a cleaner one."""

    config: DistillationConfig

    extra_passes = 1.0

    def __init__(
        self, config: DistillationConfig, space: TokenSpace, static_rows: bool = False
    ) -> None:
        super().__init__(config, space, static_rows)
        self.process = UniformProcess(space)
        schedule = duality_schedule(space.num_targets, config.gap_interval)
        self.training_process = UniformProcess(space, schedule)
        self._round = -1

    def gap(self, position: Tensor) -> Tensor:
        """Gap delta at positions of the run [b]; it doubles every round up to 1, float64 [b]."""
        rounds = (position // self.config.round_sequences).clamp(max=64).double()
        return (self.config.first_gap * 2.0**rounds).clamp(max=1.0)

    def begins_round(self, position: int) -> bool:
        """True at the first call of a round, where its teacher has still to be made."""
        current = position // self.config.round_sequences
        begins = current != self._round
        self._round = current
        return begins

    @property
    def state(self) -> dict[str, Any]:
        """Round that the teacher in the checkpoint belongs to."""
        return {"round": self._round}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue in the middle of a round with its teacher."""
        self._round = int(state["round"])

    def corrupt(self, clean: CleanBatch, noise: NoiseKey) -> TrainBatch:
        """Noise the tokens at two levels with one draw: the student's and the teacher's inputs."""
        gap = self.gap(clean.position)[:, None]
        t = (stratified_time(noise, self.time_window)[:, None] + gap).clamp(max=1.0)
        process, b, s = self.training_process, *clean.tokens.shape
        inputs = []
        for time in (t, t - gap):
            marginal = process.marginal(time)
            z, _ = process.draw(clean.tokens, marginal, noise)
            level = -marginal.alpha[:, 0].log().float()
            inputs.append((torch.where(clean.valid, z, clean.tokens), level))
        (later, level), (earlier, teacher_level) = inputs
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
        """KL divergence of each position, over the whole vocabulary."""
        return chunk.divergence_from(taught, reverse=self.config.divergence == "reverse")
