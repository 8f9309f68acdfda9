"""A reader of pools and runs, written from the text of docs/data.md alone.

It shares no code with the project: test_recount.py holds one against the other.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
import tarfile
from pathlib import Path

WORD = 2**64 - 1
DRAWS = 1024


def keys(seed: int, *numbers: int) -> tuple[int, ...]:
    """Six round keys, named by the seed and the numbers."""
    text = struct.pack(f"<{1 + len(numbers)}Q", seed, *numbers)
    digest = hashlib.blake2b(text, digest_size=48, person=b"epochal-order-v1").digest()
    return struct.unpack("<6Q", digest)


def mix(value: int, key: int) -> int:
    """A 64-bit hash of the value under the key."""
    value = (value ^ key) * 0x9E3779B97F4A7C15 & WORD
    value ^= value >> 29
    value = value * 0xBF58476D1CE4E5B9 & WORD
    return value ^ value >> 32


def permute(x: int, n: int, round_keys: tuple[int, ...]) -> int:
    """The image of x under the keyed permutation P of 0 to n - 1."""
    if n == 1:
        return 0
    bits = max(2, (n - 1).bit_length())
    low_bits = bits // 2
    low_mask, high_mask = (1 << low_bits) - 1, (1 << bits - low_bits) - 1
    while True:
        low, high = x & low_mask, x >> low_bits
        for number, key in enumerate(round_keys):
            if number % 2 == 0:
                high ^= mix(low, key) & high_mask
            else:
                low ^= mix(high, key) & low_mask
        x = high << low_bits | low
        if x < n:
            return x


def permutation(n: int, round_keys: tuple[int, ...]) -> list[int]:
    """The images of 0 to n - 1."""
    return [permute(x, n, round_keys) for x in range(n)]


def window_epoch(n: int, seed: int, epoch: int, block_length: int, window: int) -> list[int]:
    """The sequences of one epoch in the order `window(W)`."""
    starts = range(0, n, block_length)
    slots = [
        list(range(starts[block], min(n, starts[block] + block_length)))
        for block in permutation(len(starts), keys(seed, 2, epoch))
    ]
    result = []
    for number, first in enumerate(range(0, len(slots), window)):
        lying = [sequence for slot in slots[first : first + window] for sequence in slot]
        result += [lying[x] for x in permutation(len(lying), keys(seed, 1, epoch, number))]
    return result


class Source:
    """A budget with the order that a run on it alone would have."""

    def __init__(
        self, tokens: int, shard_tokens: int, *, seed: int, seq_length: int, order: str
    ) -> None:
        """Counts the sequences of the budget."""
        self.n = -(-tokens // seq_length)
        self.block_length = max(1, shard_tokens // seq_length)
        self.seed = seed
        self.order = order
        self.epoch = -1
        self.places: list[int] = []

    def at(self, position: int) -> int:
        """The sequence at a position of the source's own order."""
        epoch, place = divmod(position, self.n)  # a new epoch is computed once
        if epoch != self.epoch:
            self.epoch, self.places = epoch, self.sequences_of(epoch)
        return self.places[place]

    def sequences_of(self, epoch: int) -> list[int]:
        """The sequences of one epoch in order."""
        if self.order == "sequential":
            return list(range(self.n))
        if self.order == "global":
            return permutation(self.n, keys(self.seed, 1, epoch))
        window = int(self.order.removeprefix("window(").removesuffix(")"))
        return window_epoch(self.n, self.seed, epoch, self.block_length, window)


def draws(weights: list[float]) -> list[int]:
    """Integers with the sum 1,024, one for each weight."""
    total = sum(weights)
    exact = [weight / total * DRAWS for weight in weights]
    result = [math.floor(value) for value in exact]
    by_remainder = sorted(range(len(exact)), key=lambda i: (result[i] - exact[i], i))
    for i in by_remainder[: DRAWS - sum(result)]:
        result[i] += 1
    return result


def proportional(sources: list[Source], total: int, seed: int) -> list[tuple[int, int]]:
    """The positions of a mix that is one union, permuted as one `global` budget."""
    union = [(number, i) for number, source in enumerate(sources) for i in range(source.n)]
    result: list[tuple[int, int]] = []
    for epoch in range(-(-total // len(union))):
        result += [union[x] for x in permutation(len(union), keys(seed, 1, epoch))]
    return result[:total]


def weighted(
    sources: list[Source], total: int, seed: int, shares: list[int]
) -> list[tuple[int, int]]:
    """The positions of a mix with exact shares of every 1,024 positions."""
    row = [number for number, share in enumerate(shares) for _ in range(share)]
    result: list[tuple[int, int]] = []
    for block in range(-(-total // DRAWS)):
        seen = [block * share for share in shares]
        for entry in permutation(DRAWS, keys(seed, 3, block)):
            number = row[entry]
            result.append((number, sources[number].at(seen[number])))
            seen[number] += 1
    return result[:total]


def sequences(
    budget_pools: list[tuple[int, int]],
    *,
    seed: int,
    seq_length: int,
    epochs: float,
    order: str = "global",
    mode: str | None = None,
    weights: list[float] | None = None,
) -> list[tuple[int, int]]:
    """Pairs of source and sequence for every position of a run, in order."""
    sources = [
        Source(tokens, shard_tokens, seed=seed, seq_length=seq_length, order=order)
        for tokens, shard_tokens in budget_pools
    ]
    total = max(1, round(sum(source.n for source in sources) * epochs))
    if mode is None and len(sources) == 1:
        return [(0, sources[0].at(position)) for position in range(total)]
    if mode == "proportional" and order == "global" and weights is None:
        return proportional(sources, total, seed)
    if mode == "weighted" and weights is not None and len(weights) == len(sources):
        return weighted(sources, total, seed, draws(weights))
    raise ValueError(f"no such run: {len(sources)} sources, {mode=}, {order=}, {weights=}")


def tokens(manifest: Path, sequence: int, seq_length: int, unique_tokens: int | None) -> list[int]:
    """The valid token ids of one sequence of a budget, without pad."""
    pool = json.loads(manifest.read_text(encoding="utf-8"))
    budget = pool["tokens"] if unique_tokens is None else unique_tokens
    start, stop = sequence * seq_length, min((sequence + 1) * seq_length, budget)
    if budget > pool["tokens"] or not 0 <= start < stop:
        raise ValueError(f"no sequence {sequence} in {budget} of {pool['tokens']} tokens")
    code, width = {"<u2": ("H", 2), "<u4": ("I", 4)}[pool["dtype"]]
    result: list[int] = []
    for shard in pool["shards"]:
        place = shard["first"]
        if place >= stop or place + shard["tokens"] <= start:
            continue
        with tarfile.open(manifest.parent / shard["name"], "r:") as archive:
            for member in archive:
                reader = archive.extractfile(member)
                if reader is None or not member.name.endswith(".tok.bin"):
                    continue
                end = place + member.size // width
                if place < stop and end > start:
                    values = struct.unpack(f"<{end - place}{code}", reader.read())
                    result += values[max(0, start - place) : stop - place]
                place = end
    if len(result) != stop - start:
        raise ValueError(f"{len(result)} tokens instead of {stop - start}")
    return result


def visits(
    run_positions: list[tuple[int, int]], order: list[tuple[int, int]]
) -> dict[tuple[int, int], int]:
    """The number of visits of each (source, sequence), from the positions of a log."""
    result: dict[tuple[int, int], int] = {}
    expected = 0
    for start, stop in run_positions:
        if start != expected or not start <= stop <= len(order):
            raise ValueError(f"{start} to {stop} after {expected} of {len(order)} positions")
        for pair in order[start:stop]:
            result[pair] = result.get(pair, 0) + 1
        expected = stop
    return result
