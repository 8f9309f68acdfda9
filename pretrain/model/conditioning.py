"""adaLN conditioning on the noise level (DiT, arXiv 2212.09748), as in the diffusion papers.

Modulations are initialised to zero: a fresh noise-conditioned model ignores the noise level, and
each of its layers is the identity.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layers import sum_gradient
from parallel.layout.topology import Topology

CONDITION_SIZE = 128
_FREQUENCIES = 256


class NoiseEmbedding(nn.Module):
    """Conditioning vector of a noise level: sinusoids and a small MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(_FREQUENCIES, CONDITION_SIZE)
        self.second = nn.Linear(CONDITION_SIZE, CONDITION_SIZE)

    def forward(self, level: Tensor) -> Tensor:
        """Embed levels sigma_t = -log alpha_t, float32 [b], as [b, CONDITION_SIZE]."""
        half = _FREQUENCIES // 2
        steps = torch.arange(half, device=level.device, dtype=torch.float32)
        phase = level[:, None] * torch.exp(-math.log(10000.0) * steps / half)
        sinusoid = torch.cat((phase.cos(), phase.sin()), dim=-1).to(self.first.weight.dtype)
        return F.silu(self.second(F.silu(self.first(sinusoid))))


class Modulation(nn.Module):
    """`count` vectors of `size` from the conditioning vector: shifts, scales, gates.

    With sequence parallelism a rank modulates a slice of the sequence and knows only that slice's
    part of the gradient, which is therefore summed, as in `RMSNorm`.
    """

    def __init__(self, count: int, size: int, topology: Topology) -> None:
        super().__init__()
        self.count, self.topology = count, topology
        self.linear = nn.Linear(CONDITION_SIZE, count * size)

    def forward(self, condition: Tensor) -> tuple[Tensor, ...]:
        """Map conditions [b, CONDITION_SIZE] to `count` tensors [1, b, size]."""
        vectors = self.linear(condition)
        if self.topology.sequence_parallel:
            vectors = sum_gradient(vectors, self.topology)
        return vectors[None].chunk(self.count, dim=-1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Compute x (1 + scale) + shift for x [s, b, h]."""
    return x * (1.0 + scale) + shift
