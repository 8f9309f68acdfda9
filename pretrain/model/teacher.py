"""Teacher of distillation: a frozen copy of the student.

It is not an `nn.Module`, so that optimizer, ZeRO and DeepSpeed's casts do not find it. The engine
only saves and restores its weights. Every rank holds the same part of teacher and student: under
ZeRO 1 and 2 its whole tensor-parallel slice, in the precision in which the student computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from parallel.layers import mark_parallel_layers
from pretrain.batch import TrainBatch
from pretrain.model.transformer import Transformer
from pretrain.model.vocab import VocabChunk


class Teacher:
    """Copy of the student as it was at the beginning of the round."""

    def __init__(self, model: Transformer) -> None:
        """Take a `model` of the student's shape and layout; `renew` overwrites its weights."""
        self.model = model.requires_grad_(False).eval()
        mark_parallel_layers(model)

    @torch.no_grad()
    def renew(self, student: Transformer) -> None:
        """Copy the student's present weights, bit for bit and without communication."""
        theirs = dict(student.named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.data = theirs[name].detach().clone()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Weights, under the names that they have in the student's `ObjectiveModule`."""
        return {f"model.{name}": p for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def outputs(self, batch: TrainBatch) -> Callable[[slice], VocabChunk]:
        """Run the inputs of `batch.teacher`; returns a function from slices of the flat positions
        [b * s] to their vocabulary outputs."""
        given = batch.teacher
        hidden = self.model(given["ids"], batch.positions, batch.attention, given["noise_level"])
        rows = hidden.transpose(0, 1).flatten(0, 1)

        @torch.no_grad()
        def answer(part: slice) -> VocabChunk:
            return self.model.vocabulary(rows[part])

        return answer
