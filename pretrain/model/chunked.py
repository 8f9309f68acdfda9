"""Losses of hidden rows in chunks, so that logits [rows, vocabulary] never exist as a whole.

A training loss is a sum. Its gradients are therefore computed chunk by chunk in the forward pass,
and only the gradients of the rows and of the weight are kept for the backward pass. Nothing is
computed twice. Each chunk costs one addition of [vocabulary, hidden]; so chunks are as large as
memory allows, and a loss that fits into memory is computed in one chunk.
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
"""(outputs of a slice of the rows, the slice) -> the term of each of its rows, [n]."""

CHUNK_BYTES = 256 << 20
"""Bytes of the float32 logits of one chunk."""
WHOLE_BYTES = 1 << 30
"""Bytes of float32 logits up to which a CPU computes all rows at once, because chunks cost time."""


def slices(rows: Tensor, weight: Tensor, chunk: int | None) -> list[slice]:
    """Chunks of nearly equal size, of `chunk` rows each; 0 takes all rows, None chooses by memory.

    There is always at least one chunk. Where context parallelism leaves a rank without rows, its
    loss is the sum of an empty chunk, so that the rank takes part in the collectives of the others.
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
    """Term of each row, [n]; computed in chunks where no gradient is needed."""
    parts = slices(rows, weight, 0 if torch.is_grad_enabled() else chunk)
    return torch.cat([terms(outputs(rows[p], weight), p) for p in parts])


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


class _Total(torch.autograd.Function):
    """Sum of terms whose gradients are computed in the forward pass.

    They are those of the plain sum. Under tensor parallelism every chunk reduces its gradients.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, outputs: Outputs, terms: Terms, parts: list[slice]
    ) -> Tensor:
        """Loss and gradients of one chunk after another."""
        leaf = weight.detach().requires_grad_()
        row_gradient = torch.empty_like(rows)
        # In half precision the sum over many chunks would round away what each of them adds.
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight_gradient = torch.zeros_like(weight, dtype=wide)
        values = []
        for part in parts:
            # Hooks set outside (offloading, measurements) are for tensors kept until the backward
            # pass; these are not.
            with torch.enable_grad(), saved_tensors_hooks(_unchanged, _unchanged):
                chunk = rows[part].detach().requires_grad_()  # [n / chunks, h]
                value = terms(outputs(chunk, leaf), part).sum()
            row_gradient[part], added = torch.autograd.grad(value, (chunk, leaf))
            weight_gradient += added  # [v / tp, h]
            values.append(value.detach())
        ctx.save_for_backward(row_gradient, weight_gradient)
        ctx.dtype = weight.dtype
        return torch.stack(values).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Scale the gradients, as the loss may have been scaled since the forward pass."""
        (scale,) = gradients
        row_gradient, weight_gradient = ctx.saved_tensors
        weight = (weight_gradient * scale).to(ctx.dtype)
        return row_gradient * scale, weight, None, None, None
