"""Dropout whose masks follow from a key, so that nothing of them is kept or restored.

A mask is a function of (run seed, first position of the micro-batch, layer and place in it, shard).
A position of the run is visited in one step only, so the step is in it. The backward pass and a
recomputed layer draw the same mask again, a resumed run goes on with the masks it would have had,
and no global generator moves. Ranks that hold the same activations name the same shard and so drop
the same elements; ranks that hold different parts of them name different ones. Another layout or
micro-batch size draws other masks of the same distribution.
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
    """Of the micro-batch: `NoiseKey.number`."""
    residual: str = ""
    """The part of the residual stream that this rank holds, and shares with nobody else."""
    heads: str = ""
    """The same of attention heads."""
    layer: int = -1
    """-1 before the first."""

    def of(self, place: str) -> int:
        """Seed of the mask at `place` in the layer, 63 bits."""
        high, low = stream_key(self.seed, f"dropout/{self.layer}/{place}")
        return (high << 32 | low) >> 1


def dropout(x: Tensor, p: float, key: DropoutKey | None, place: str) -> Tensor:
    """x with each element 0 with probability p, else divided by 1 - p; x itself without a key."""
    if key is None or p == 0.0:
        return x
    dropped: Tensor = _Dropout.apply(x, p, key.of(f"{place}/{key.residual}"))
    return dropped


@contextmanager
def seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Inside, torch's generator of `device` draws as from `seed`; afterwards as if nothing was.

    For attention kernels, which draw from that generator and remember for themselves what.
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
    """0 with probability p, else 1 / (1 - p); a function of seed and shape."""
    generator = torch.Generator(like.device).manual_seed(seed)
    factors = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    return factors.bernoulli_(1.0 - p, generator=generator).div_(1.0 - p)
