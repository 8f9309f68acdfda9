"""The order of a budget: a keyed permutation of its sequences in each epoch.

An alternating Feistel network on the bits of n with cycle walking is a bijection of range(n) for
every n, needs O(1) memory and no start-up, and can be inverted; a materialised shuffle would need
8 bytes a sequence and seconds before the first batch. The price is some 0.2 us a position, paid
in blocks. The mapping is frozen: any change must raise `ORDER_VERSION`, and golden vectors in the
tests hold it in place.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError

ORDER_VERSION: Final = 1
ROUNDS: Final = 6
IntArray: TypeAlias = NDArray[np.int64]
Keys: TypeAlias = NDArray[np.uint64]

_SEQUENCES: Final = 1
_BLOCKS: Final = 2
_MULTIPLIERS: Final = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9))


@lru_cache(maxsize=256)
def round_keys(seed: int, stream: int, *indices: int) -> Keys:
    """Round keys of one permutation, uint64 [6]: blake2b of (seed, stream, indices)."""
    words = struct.pack(f"<{2 + len(indices)}Q", seed, stream, *indices)
    digest = blake2b(words, digest_size=8 * ROUNDS, person=b"epochal-order-v1").digest()
    return np.frombuffer(digest, "<u8").astype(np.uint64)


def permute(x: IntArray, n: int, keys: Keys) -> IntArray:
    """Image of positions `x` (int64, in range(n)) under the permutation of range(n)."""
    return _walk(x, n, keys, inverse=False)


def unpermute(x: IntArray, n: int, keys: Keys) -> IntArray:
    """Positions whose image under `permute` is `x`."""
    return _walk(x, n, keys, inverse=True)


def _walk(x: IntArray, n: int, keys: Keys, *, inverse: bool) -> IntArray:
    """Apply the network until every value lies in range(n): fewer than two passes on average."""
    if n <= 1:
        return np.zeros_like(x)
    bits = max(2, (n - 1).bit_length())
    values = _network(x.astype(np.uint64), bits, keys, inverse)
    outside = np.flatnonzero(values >= n)
    while outside.size:
        again = _network(values[outside], bits, keys, inverse)
        values[outside] = again
        outside = outside[again >= n]
    return values.astype(np.int64)


def _network(
    values: NDArray[np.uint64], bits: int, keys: Keys, inverse: bool
) -> NDArray[np.uint64]:
    """One pass over `bits` bits: each round xors one half with a keyed mix of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    high, low = values >> low_bits, values & low_mask
    rounds = range(len(keys) - 1, -1, -1) if inverse else range(len(keys))
    for r in rounds:
        if r % 2 == 0:
            high = high ^ (_mix(low, keys[r]) & high_mask)
        else:
            low = low ^ (_mix(high, keys[r]) & low_mask)
    return (high << low_bits) | low


def _mix(half: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    mixed = half ^ key
    mixed *= _MULTIPLIERS[0]
    mixed ^= mixed >> np.uint64(29)
    mixed *= _MULTIPLIERS[1]
    mixed ^= mixed >> np.uint64(32)
    return mixed


def window_size(kind: str) -> int | None:
    """Blocks per window of `window(W)`, None for `global` and `sequential`; else DataError."""
    if kind in ("global", "sequential"):
        return None
    match = re.fullmatch(r"window\((\d+)\)", kind)
    if match is None or int(match[1]) < 1:
        raise DataError(
            f"unknown order {kind!r}; allowed: global, sequential, window(W) with W >= 1 shards"
        )
    return int(match[1])


@dataclass(frozen=True)
class _Layout:
    """One epoch of a window order: blocks in keyed order, the short one at any slot."""

    blocks: IntArray
    """Block held by each slot."""
    starts: IntArray
    """First position of each slot, and the end."""


class Order:
    """Order of sequence ids: epoch e visits every sequence of range(n) once, in keyed order.

    `global` permutes the whole budget; `sequential` does not permute; `window(W)` permutes blocks
    of `block` consecutive sequences (a shard's worth), then the sequences of W consecutive blocks
    together, so that only about W shards are in use at any time.
    """

    def __init__(self, kind: str, sequences: int, seed: int, block: int = 1) -> None:
        """Order n = `sequences` >= 1; `block` is the number of sequences a shard (for windows)."""
        assert sequences >= 1
        assert block >= 1
        self.kind, self.sequences, self.seed, self.block = kind, sequences, seed, block
        self._window = window_size(kind)
        self._layouts: dict[int, _Layout] = {}

    def at(self, positions: IntArray) -> IntArray:
        """Sequence ids, int64 [k], at global positions, int64 [k] (epoch * n + place)."""
        epochs, places = np.divmod(positions, self.sequences)
        if epochs.size == 0 or epochs.min() == epochs.max():
            return self._epoch(int(epochs[0]), places) if epochs.size else places
        ids = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            ids[chosen] = self._epoch(int(epoch), places[chosen])
        return ids

    def find(self, sequence: int, epoch: int) -> int:
        """Global position at which `epoch` visits `sequence`: the inverse of `at`."""
        start, target = epoch * self.sequences, np.array([sequence], np.int64)
        if self.kind == "sequential":
            return start + sequence
        if self._window is None:
            keys = round_keys(self.seed, _SEQUENCES, epoch)
            return start + int(unpermute(target, self.sequences, keys)[0])
        layout = self._layout(epoch)
        slot = int(np.flatnonzero(layout.blocks == sequence // self.block)[0])
        inner = int(layout.starts[slot]) + sequence % self.block
        window = slot // self._window
        first, length = self._bounds(layout, window)
        keys = round_keys(self.seed, _SEQUENCES, epoch, window)
        return start + first + int(unpermute(np.array([inner - first]), length, keys)[0])

    def _epoch(self, epoch: int, places: IntArray) -> IntArray:
        """Sequence ids at places of one epoch."""
        if self.kind == "sequential":
            return places
        if self._window is None:
            return permute(places, self.sequences, round_keys(self.seed, _SEQUENCES, epoch))
        layout = self._layout(epoch)
        slots = np.searchsorted(layout.starts, places, "right") - 1
        windows = slots // self._window
        inner = np.empty_like(places)
        for window in np.unique(windows):
            chosen = windows == window
            first, length = self._bounds(layout, int(window))
            keys = round_keys(self.seed, _SEQUENCES, epoch, int(window))
            inner[chosen] = first + permute(places[chosen] - first, length, keys)
        slots = np.searchsorted(layout.starts, inner, "right") - 1
        return layout.blocks[slots] * self.block + inner - layout.starts[slots]

    def _bounds(self, layout: _Layout, window: int) -> tuple[int, int]:
        """First position and length of a window."""
        assert self._window is not None
        last = min((window + 1) * self._window, len(layout.blocks))
        first = int(layout.starts[window * self._window])
        return first, int(layout.starts[last]) - first

    def _layout(self, epoch: int) -> _Layout:
        """Blocks of an epoch in keyed order, kept until another epoch is asked for."""
        layout = self._layouts.get(epoch)
        if layout is None:
            count = -(-self.sequences // self.block)
            blocks = permute(np.arange(count), count, round_keys(self.seed, _BLOCKS, epoch))
            lengths = np.full(count, self.block, np.int64)
            lengths[blocks == count - 1] = self.sequences - (count - 1) * self.block
            starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
            layout = _Layout(blocks, starts)
            self._layouts = {epoch: layout}
        return layout
