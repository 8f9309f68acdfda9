"""Losses from hidden rows, so many rows at a time that [rows x vocabulary] never exists as a whole.

A training loss is a sum, so that its gradients can be computed chunk by chunk in the forward pass:
what is kept for the backward pass is the gradient of each row and that of the weight. Nothing is
computed twice. The price is one addition of [vocabulary x hidden] a chunk, which is why the chunks
are as large as memory comfortably allows, and why a loss that fits is computed in one piece.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from pretrain.model.vocab import VocabChunk

Outputs = Callable[[Tensor, Tensor], VocabChunk]
"""(rows [n, h], weight [v/tp, h]) -> vocabulary outputs."""
Terms = Callable[[VocabChunk, slice], Tensor]
"""(outputs of some rows, which rows) -> the term of each, [n]."""

CHUNK_BYTES = 256 << 20
"""Float32 logits of a chunk."""
WHOLE_BYTES = 1 << 30
"""Float32 logits up to which a CPU takes all rows at once: chunks cost it time."""


def slices(rows: Tensor, weight: Tensor, chunk: int | None) -> list[slice]:
    """Chunks of nearly equal size: `chunk` rows (0: all), None as many as memory suggests.

    Never none at all: where context parallelism leaves a rank without a row, its loss is the sum
    of an empty chunk, so that it takes part in the collectives of the others.
    """
    n, row_bytes = rows.shape[0], 4 * weight.shape[0]
    if chunk is None:
        at_once = WHOLE_BYTES if rows.device.type == "cpu" else CHUNK_BYTES
        chunk = 0 if n * row_bytes <= at_once else max(1, CHUNK_BYTES // row_bytes)
    count = 1 if chunk == 0 else max(1, -(-n // chunk))
    step = max(1, -(-n // count))
    return [slice(start, min(start + step, n)) for start in range(0, max(1, n), step)]


def total(
    outputs: Outputs, rows: Tensor, weight: Tensor, terms: Terms, chunk: int | None
) -> Tensor:
    """Sum of the terms of all rows, 0-d; differentiable by rows and weight."""
    parts = slices(rows, weight, chunk)
    if len(parts) == 1:
        return terms(outputs(rows, weight), parts[0]).sum()
    if torch.is_grad_enabled():
        summed: Tensor = _Total.apply(rows, weight, outputs, terms, parts)
        return summed
    return torch.stack([terms(outputs(rows[p], weight), p).sum() for p in parts]).sum()


def each(outputs: Outputs, rows: Tensor, weight: Tensor, terms: Terms, chunk: int | None) -> Tensor:
    """The term of each row, [n]; in chunks where no gradient is wanted."""
    parts = slices(rows, weight, 0 if torch.is_grad_enabled() else chunk)
    return torch.cat([terms(outputs(rows[p], weight), p) for p in parts])


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Total(torch.autograd.Function):
    """The gradients are those of the plain sum; under tensor parallelism every chunk reduces."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, outputs: Outputs, terms: Terms, parts: list[slice]
    ) -> Tensor:
        """Loss and gradients of one chunk after another."""
        leaf = weight.detach().requires_grad_()
        row_gradient = torch.empty_like(rows)
        # Half-precision sums of many chunks would lose what each adds.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_gradient = torch.zeros_like(weight, dtype=wide)
        values = []
        for part in parts:
            # Hooks from outside (offloading, measuring) concern what is kept; this is not.
            with torch.enable_grad(), saved_tensors_hooks(_as_it_is, _as_it_is):
                own = rows[part].detach().requires_grad_()
                value = terms(outputs(own, leaf), part).sum()
            row_gradient[part], of_weight = torch.autograd.grad(value, (own, leaf))
            weight_gradient += of_weight
            values.append(value.detach())
        ctx.save_for_backward(row_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """The gradients are there; the loss may have been scaled since."""
        (scale,) = gradients
        row_gradient, weight_gradient = ctx.saved_tensors
        of_weight = (weight_gradient * scale).to(ctx.dtype)
        return row_gradient * scale, of_weight, None, None, None
