"""Short convolutions: depthwise convolutions over neighbouring tokens, before attention and MLP.

    y_l = x_l + sum over d of w_d x_(l+d)        w_d [h];  d = -(k-1)..0 or -(k-1)/2..(k-1)/2

They give a layer what attention must otherwise learn first: the tokens next to each token. A
neighbour is read only where the attention rule lets the token attend to it, so that nothing hidden
passes through a convolution (`readable_neighbours`). Weights start small and random, so that the
channels differ between neighbours from the first step on; a model whose weights start at zero
learns to use them later.

The sum is computed by shifted copies, which on a CPU cost a quarter of torch's depthwise
convolution. A compiled layer takes the plain formula, which the compiler fuses.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from pretrain.batch import AttentionRule
from pretrain.model.attention.flex import mask_function
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
        """Add to x [s, b, h] its convolution.

        `readable` [k, s, b or 1, 1] is 1 where a neighbour is read; None reads all. With a `cache`
        x are new tokens, and the cache gives their neighbours.
        """
        if cache is not None:
            around = cache.neighbours(self.place, x, self.offsets)
            return x + (around * self.weight[:, None, None]).sum(dim=0)
        return convolve(x, self.weight, readable, -self.offsets.start)


def kernel_offsets(kernel: int, causal: bool) -> range:
    """Distances of the neighbours that a kernel reads, its centre at 0."""
    first = 1 - kernel if causal else -(kernel // 2)
    return range(first, first + kernel)


def readable_neighbours(rule: AttentionRule, offsets: range, x: Tensor) -> Tensor | None:
    """Mask of neighbours, 1 where a token reads its neighbour: [k, s, b or 1, 1], x [s, b, h].

    A token reads a neighbour if the sequence has it and the rule lets the token attend to it. None
    where nothing but the ends of the sequence is excluded. The mask is built once a batch, without
    a wait for the device.
    """
    reads_later = offsets.stop > 1
    if rule.kind == "bidirectional" or (rule.kind == "causal" and not reads_later):
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
        allowed = allowed & mask_function(rule)(row, query, query, key)
    return allowed.permute(2, 1, 0)[..., None].to(x.dtype)  # [b, s, k] -> [k, s, b, 1]


def convolve(x: Tensor, weight: Tensor, readable: Tensor | None, before: int) -> Tensor:
    """Add to x [s, b, h] its convolution with `weight` [k, h], of which `before` rows look back."""
    if torch.compiler.is_compiling():
        return _plain(x, weight, readable, before)
    out: Tensor = _Convolution.apply(x, weight, readable, before)
    return out


def _plain(x: Tensor, weight: Tensor, readable: Tensor | None, before: int) -> Tensor:
    """Plain formula of `convolve`."""
    padded = F.pad(x, (0, 0, 0, 0, before, len(weight) - 1 - before))
    y = x
    for j in range(len(weight)):
        neighbour = padded[j : j + len(x)] * weight[j]
        y = y + (neighbour if readable is None else neighbour * readable[j])
    return y


class _Convolution(Function):
    """Convolution with one pass over memory for each weight forward, and three backward."""

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
    """Positions that have a neighbour, and these neighbours, for each weight."""
    shifts = []
    for d in range(-before, kernel - before):
        first, last = max(0, -d), max(0, length - max(0, d))
        first = min(first, length)
        shifts.append((slice(first, last), slice(first + d, last + d)))
    return shifts
