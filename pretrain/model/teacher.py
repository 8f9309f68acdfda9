"""The frozen copy of the student that a distilling objective learns from.

It is no `nn.Module`, so that neither optimizer nor ZeRO nor DeepSpeed's casts know of it; the
engine only carries its weights through checkpoints. Every rank holds what it holds of the student:
under ZeRO 1 and 2 all of its tensor-parallel slice, in the precision that the student computes in.
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
    """Answers with the weights that the student had when it was last renewed."""

    def __init__(self, model: Transformer) -> None:
        """`model` has the student's shape and layout; its weights are overwritten by `renew`."""
        self.model = model.requires_grad_(False).eval()
        mark_parallel_layers(model)

    @torch.no_grad()
    def renew(self, student: Transformer) -> None:
        """Take over the student's present weights, bit for bit; no communication."""
        theirs = dict(student.named_parameters())
        for name, parameter in self.model.named_parameters():
            parameter.data = theirs[name].detach().clone()

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights under the names they have in the student's `ObjectiveModule`."""
        return {f"model.{name}": p for name, p in self.model.named_parameters()}

    @torch.no_grad()
    def read(self, batch: TrainBatch) -> Callable[[slice], VocabChunk]:
        """Read what `batch.teacher` holds; gives vocabulary outputs of flat positions [b * s]."""
        given = batch.teacher
        hidden = self.model(given["ids"], batch.positions, batch.attention, given["noise_level"])
        rows = hidden.transpose(0, 1).flatten(0, 1)

        @torch.no_grad()
        def answer(part: slice) -> VocabChunk:
            return self.model.vocabulary(rows[part])

        return answer
