"""Counter-based randomness: every draw is a pure function of its key and its position.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in integer
operations of torch, or of numpy for a few words, gives the same words on every device, on every
rank, in every layout and after every resume. It costs about a hundred small operations a call,
which the host runs in the background of a step.

    key      two words hashed from (run seed, stream name)
    counter  element // 4  |  draw + attempt * 2^16  |  position low  |  position high
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_LIMIT = 1 << 16
_ONE_THREAD = 1 << 15
"""Elements for which torch, too, takes one thread."""


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Apply ten rounds of Philox-4x32 to int64 tensors of 32-bit words (broadcast together)."""
    small = math.prod(torch.broadcast_shapes(*(c.shape for c in counter))) <= _ONE_THREAD
    if small and all(c.device.type == "cpu" for c in counter):
        # The same operations in a third of the time: for so few words starting one is all it takes.
        words = _rounds(tuple(c.numpy() for c in counter), key)
        return tuple(torch.from_numpy(c) for c in words)  # type: ignore[return-value]
    return _rounds(counter, key)


def _rounds(counter: tuple[Any, ...], key: tuple[int, int]) -> tuple[Any, ...]:
    """Ten rounds on tensors or arrays."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves both 32-bit halves exact.
        p0, p1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL_0) & _WORD, (k1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def stream_key(seed: int, stream: str) -> tuple[int, int]:
    """Hash the seed of a run and the name of a stream to two 32-bit key words."""
    digest = hashlib.blake2b(
        seed.to_bytes(8, "little") + stream.encode(), digest_size=8, person=b"epochal-noise-v1"
    ).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


@dataclass(frozen=True)
class NoiseKey:
    """Randomness of a run at given positions: `uniform` and `normal` of any length, by stream."""

    seed: int
    """Run seed, 0 <= seed < 2^63."""
    position: Tensor
    """Owners of the draws, int64 [b]: global sample positions (or rows of a weight)."""
    attempt: int = 0
    """Number of the draw where a position is drawn several times."""
    stratum: tuple[int, int] = (0, 1)
    """(k, n): noise levels come from the k-th of n equal parts of (0, 1)."""

    def at(self, position: Tensor) -> NoiseKey:
        """Key of the same run at other positions."""
        return replace(self, position=position)

    def number(self, stream: str) -> int:
        """Integer of 63 bits of the first position, to seed another generator."""
        high, low = stream_key(self.seed, f"{stream}/{int(self.position[0])}")
        return (high << 32 | low) >> 1

    def words(self, stream: str, length: int, draw: int = 0) -> Tensor:
        """Random 32-bit words, int64 [b, length]; `draw` numbers independent draws of a stream."""
        if not (0 <= draw < _LIMIT and 0 <= self.attempt < _LIMIT):
            raise ValueError(f"draw {draw} and attempt {self.attempt} must be below {_LIMIT}")
        position = self.position[:, None]
        block = torch.arange(-(-length // 4), device=position.device)[None]
        counter = (
            block,
            torch.full_like(block, draw | (self.attempt << 16)),
            position & _WORD,
            (position >> 32) & _WORD,
        )
        lanes = torch.broadcast_tensors(*philox(counter, stream_key(self.seed, stream)))
        return torch.stack(lanes, dim=-1).flatten(1)[:, :length]

    def uniform(self, stream: str, length: int, draw: int = 0) -> Tensor:
        """Uniforms in (0, 1) as float64 [b, length], exact multiples of 2^-33 on every device."""
        return (self.words(stream, length, draw).double() + 0.5) * 2.0**-32

    def fine_uniform(self, stream: str, length: int, draw: int = 0) -> Tensor:
        """Uniforms in (0, 1) with 52 bits, float64 [b, length], for tails beyond 32 bits."""
        w = self.words(stream, 2 * length, draw)
        high, low = w[:, 0::2], w[:, 1::2]
        return ((high << 20 | low >> 12).double() + 0.5) * 2.0**-52

    def normal(self, stream: str, length: int, draw: int = 0) -> Tensor:
        """Standard normals by Box-Muller, float64 [b, length]; equal to rounding across devices."""
        u = self.uniform(stream, length + length % 2, draw)
        radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
        angle = (2.0 * math.pi) * u[:, 1::2]
        pairs = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
        return pairs.flatten(1)[:, :length]
