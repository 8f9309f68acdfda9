"""Dropout with keyed masks, which are neither kept for the backward pass nor checkpointed.

A mask is a function of (run seed, first position of the micro-batch, layer and place in it, shard).
The step need not be named, because a position of the run belongs to one step. The backward pass and
a recomputed layer draw the same mask again. A resumed run goes on with the masks that it would have
had. No global generator changes its state.

Ranks that hold the same activations name the same shard, and so drop the same elements. Ranks that
hold different parts name different shards. Another layout or micro-batch size draws other masks of
the same distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pretrain.noise.key import stream_key


@dataclass(frozen=True)
class DropoutKey:
    """Key of the masks of one micro-batch."""

    seed: int
    """Seed of the micro-batch, from `NoiseKey.number`."""
    residual: str = ""
    """Name of the part of the residual stream that only this rank holds."""
    heads: str = ""
    """Name of the attention heads that only this rank holds."""
    layer: int = -1
    """Number of the layer in the model; -1 before the first."""

    def of(self, place: str) -> int:
        """Seed of the mask at `place` in the layer, 63 bits."""
        high, low = stream_key(self.seed, f"dropout/{self.layer}/{place}")
        return (high << 32 | low) >> 1


def dropout(x: Tensor, p: float, key: DropoutKey | None, place: str) -> Tensor:
    """Set each element of x to 0 with probability p and divide the others by 1 - p.

    Without a key x is returned as it is.
    """
    if key is None or p == 0.0:
        return x
    dropped: Tensor = _Dropout.apply(x, p, key.of(f"{place}/{key.residual}"))
    return dropped


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Context in which torch's generator of `device` draws from `seed`; then its state is restored.

    For attention kernels, which draw from that generator and save its state for their backward
    pass.
    """
    generator = torch.default_generator
    if device.type == "cuda":
        generator = torch.cuda.default_generators[device.index or 0]
    state = generator.get_state()
    generator.manual_seed(seed)
    try:
        yield
    finally:
        generator.set_state(state)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: int) -> Tensor:
        ctx.p, ctx.seed = p, seed
        return _factors(x, p, seed).mul_(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (g,) = gradients
        return _factors(g, ctx.p, ctx.seed).mul_(g), None, None


def _factors(like: Tensor, p: float, seed: int) -> Tensor:
    """Factors 0 with probability p, else 1 / (1 - p); a function of seed and shape."""
    generator = torch.Generator(like.device).manual_seed(seed)
    factors = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return factors.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)
