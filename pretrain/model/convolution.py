"""Short convolutions: a token reads its nearest neighbours, each channel by weights of its own.

    y_l = x_l + sum over d of w_d x_(l+d)        w_d [h];  d = -(k-1)..0 or -(k-1)/2..(k-1)/2

In front of attention and of the MLP they give a layer what attention must otherwise learn first:
which tokens stand side by side. A neighbour is read only where the attention rule lets the token
read it, so that nothing hidden comes in by this way (`readable_neighbours`). Weights start small
and random, so that channels tell neighbours apart from the first step on: from zero a model learns
later what they are for.

Everything is a sum of shifted copies, which on a CPU costs a tenth of torch's own depthwise
convolution; a compiled layer takes the plain form, of which the compiler makes one pass.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pretrain.batch import AttentionRule
from pretrain.model.attention.flex import reads
from pretrain.model.cache import LayerCache


class ShortConvolution(nn.Module):
    """Depthwise convolution over neighbouring tokens, added to its input.

    Its weight is replicated over tensor-parallel ranks, which all compute the same.
    """

    def __init__(self, size: int, kernel: int, causal: bool, place: str) -> None:
        """`size` channels; `place` names the inputs of this convolution in a cache."""
        super().__init__()
        self.offsets, self.place = kernel_offsets(kernel, causal), place
        self.weight = nn.Parameter(torch.empty(kernel, size))

    def forward(
        self, x: Tensor, readable: Tensor | None = None, cache: LayerCache | None = None
    ) -> Tensor:
        """[s, b, h] -> [s, b, h]; `readable` [k, s, b or 1, 1] is 1 where a neighbour is read, None
        reads all. With a `cache` x are new tokens, whose neighbours the cache knows."""
        if cache is not None:
            around = cache.neighbours(self.place, x, self.offsets)
            return x + (around * self.weight[:, None, None]).sum(dim=0)
        return convolve(x, self.weight, readable, -self.offsets.start)


def kernel_offsets(kernel: int, causal: bool) -> range:
    """Distances of the neighbours that a kernel reads, its centre at 0."""
    first = 1 - kernel if causal else -(kernel // 2)
    return range(first, first + kernel)


def readable_neighbours(rule: AttentionRule, offsets: range, x: Tensor) -> Tensor | None:
    """1 where a token reads its neighbour, else 0: [k, s, b or 1, 1] for k offsets, x [s, b, h].

    A neighbour counts if the sequence has it and the rule lets the token read it. None where
    nothing but the ends of the sequence is left out. Built once a batch; no host waits for it.
    """
    looks_ahead = offsets.stop > 1
    if rule.kind == "bidirectional" or (rule.kind == "causal" and not looks_ahead):
        return None
    length, device = len(x), x.device
    query = torch.arange(length, device=device)[:, None]
    neighbour = query + torch.arange(offsets.start, offsets.stop, device=device)  # [s, k]
    key = neighbour.clamp(0, length - 1)
    allowed = (neighbour == key)[None]
    if rule.columns is None:
        allowed = allowed & (key <= query)
    else:
        row = torch.arange(rule.columns.shape[1], device=device)[:, None, None]
        allowed = allowed & reads(rule)(row, query, query, key)
    return allowed.permute(2, 1, 0)[..., None].to(x.dtype)  # [b, s, k] -> [k, s, b, 1]


def convolve(x: Tensor, weight: Tensor, readable: Tensor | None, before: int) -> Tensor:
    """x [s, b, h] plus its convolution with `weight` [k, h], of which `before` rows look back."""
    if torch.compiler.is_compiling():
        return _plain(x, weight, readable, before)
    out: Tensor = _Convolution.apply(x, weight, readable, before)
    return out


def _plain(x: Tensor, weight: Tensor, readable: Tensor | None, before: int) -> Tensor:
    """The definition."""
    padded = F.pad(x, (0, 0, 0, 0, before, len(weight) - 1 - before))
    y = x
    for j in range(len(weight)):
        neighbour = padded[j : j + len(x)] * weight[j]
        y = y + (neighbour if readable is None else neighbour * readable[j])
    return y


class _Convolution(Function):
    """One fused multiply-add over memory for each weight, forward; two more backward."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, readable: Tensor | None, before: int
    ) -> Tensor:
        ctx.save_for_backward(x, weight, readable)
        ctx.before = before
        out = torch.addcmul(x, x, weight[before])  # a token always reads itself
        for j, (to, source) in enumerate(_shifts(len(x), len(weight), before)):
            if j == before:
                continue
            if readable is None:
                out[to].addcmul_(x[source], weight[j])
            else:
                out[to].addcmul_(x[source] * weight[j], readable[j, to])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (g,) = gradients
        x, weight, readable = ctx.saved_tensors
        before = ctx.before
        dx, dweight = torch.addcmul(g, g, weight[before]), torch.empty_like(weight)
        product = torch.empty_like(x, memory_format=torch.contiguous_format)
        for j, (to, source) in enumerate(_shifts(len(x), len(weight), before)):
            part = g[to]
            if j != before:
                if readable is not None:
                    part = part * readable[j, to]
                dx[source].addcmul_(part, weight[j])
            torch.mul(part, x[source], out=product[to])
            torch.sum(product[to].flatten(0, 1), dim=0, out=dweight[j])
        return dx, dweight, None, None


def _shifts(length: int, kernel: int, before: int) -> list[tuple[slice, slice]]:
    """For each weight the positions that read a neighbour, and these neighbours."""
    shifts = []
    for d in range(-before, kernel - before):
        first, last = max(0, -d), max(0, length - max(0, d))
        first = min(first, length)
        shifts.append((slice(first, last), slice(first + d, last + d)))
    return shifts
