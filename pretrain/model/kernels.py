"""Elementwise parts of the transformer in few passes over memory, forward and backward.

On a CPU a small model spends more time in norms, rotary phases and gates than in matrix products
when autograd composes them from single operations. Each function here computes its plain formula
(tests compare the two) with a gradient written by hand. On CUDA the norm is torch's fused kernel. A
compiled layer takes the plain formulas, because the compiler fuses them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute x / sqrt(mean(x^2) + eps) * weight over the last dimension."""
    if x.is_cuda or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    out: Tensor = _RMSNorm.apply(x, weight, eps)
    return out


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the halves a, b of the last dimension to (a cos - b sin, b cos + a sin).

    x is [s, b, groups, heads, d]; cos and sin broadcast to [s, b, groups, heads, d/2].
    """
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    if torch.compiler.is_compiling():
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    out: Tensor = _Rotate.apply(x, cos, sin)
    return out


def swiglu(y: Tensor) -> Tensor:
    """Compute silu(gate) * up for y = [gate, up] along the last dimension."""
    if torch.compiler.is_compiling():
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate) * up
    out: Tensor = _SwiGLU.apply(y)
    return out


def squared_relu(x: Tensor) -> Tensor:
    """Compute max(x, 0)^2."""
    if torch.compiler.is_compiling():
        return F.relu(x).square()
    out: Tensor = _SquaredReLU.apply(x)
    return out


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return torch.mul(x, inverse).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (g,) = gradients
        x, weight, inverse = ctx.saved_tensors
        # With y = x inverse: dw = sum g y;  dx = inverse (g w - y mean(g w y)).
        normed = x * inverse
        product = g * normed
        dweight = product.flatten(0, -2).sum(dim=0)
        mean = torch.matmul(product, weight)[..., None].div_(x.shape[-1])
        dx = (g * weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return dx, dweight, None


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Rotation by +phase (sign 1) or -phase (sign -1)."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    torch.mul(a, cos, out=out[..., :half])
    out[..., :half].addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=out[..., half:])
    out[..., half:].addcmul_(a, sin, value=sign)
    return out


class _Rotate(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradients[0], cos, sin, -1.0), None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        gate, up = y.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (g,) = gradients
        (y,) = ctx.saved_tensors
        gate, up = y.chunk(2, dim=-1)
        dy = torch.empty_like(y)
        dgate, dup = dy.chunk(2, dim=-1)
        torch.mul(g, up, out=dgate)
        torch.ops.aten.silu_backward.grad_input(dgate, gate, grad_input=dgate)
        torch.ops.aten.silu.out(gate, out=dup).mul_(g)
        return dy


class _SquaredReLU(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.relu(x).square_()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (g,) = gradients
        (x,) = ctx.saved_tensors
        return F.relu(x).mul_(2.0).mul_(g)
