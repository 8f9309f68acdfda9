"""The frozen copy of the student that a distilling objective learns from.

It is no `nn.Module`, so that neither optimizer nor ZeRO nor DeepSpeed's casts know of it; the
engine only carries its weights through checkpoints. Every rank holds what it holds of the student:
under ZeRO 1 and 2 all of its tensor-parallel slice, in the precision that the student computes in.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
    def read(self, batch: TrainBatch) -> Tensor:
        """Hidden rows [b * s, h] for what `batch.teacher` holds."""
        given = batch.teacher
        hidden = self.model(given["ids"], batch.positions, batch.attention, given["noise_level"])
        rows: Tensor = hidden.transpose(0, 1).flatten(0, 1)
        return rows

    @torch.no_grad()
    def answer(self, rows: Tensor) -> VocabChunk:
        """Vocabulary outputs of hidden rows [n, h]."""
        return self.model.vocabulary(rows)
