"""Mixtures: several budgets in one stream, still a pure function of the position.

`proportional` is the union of the budgets under one permutation: every token once per epoch.
`weighted` repeats sources at different rates: weights become integers n_i that sum to 1024, and
every block of 1024 positions holds exactly n_i draws of source i in keyed order. A source's own
position then follows in closed form, so each source has its epochs and none has a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np

from data_pipeline.errors import BudgetError, DataError
from data_pipeline.shards.manifest import canonical_json
from data_pipeline.stream.budget import total_positions
from data_pipeline.stream.order import ORDER_VERSION, IntArray, Order, permute, round_keys
from data_pipeline.stream.stream import Plan, TokenBatch, TokenStream

BLOCK = 1024
_MIXTURE = 3
MixtureMode = Literal["proportional", "weighted"]


@dataclass(frozen=True)
class MixtureSource:
    """One budget of a mixture."""

    name: str
    stream: TokenStream
    weight: float = 1.0
    """Relative share of the positions (`weighted` only)."""
    max_epochs: float | None = None
    """Upper limit of the source's epochs."""


class MixtureStream:
    """Several budgets as one stream of `total_positions` sequences."""

    def __init__(
        self, sources: Sequence[MixtureSource], mode: MixtureMode, *, seed: int, epochs: float
    ) -> None:
        """Mix `sources` for `epochs` passes over the sum of all budgets.

        DataError for sources that do not fit together, BudgetError where one would exceed its
        `max_epochs`.
        """
        _check_sources(sources, mode)
        if not epochs > 0:
            raise DataError(f"epochs {epochs} must be positive")
        self.sources, self.mode, self.seed = tuple(sources), mode, seed
        self.seq_length = sources[0].stream.seq_length
        self._sizes = np.array([s.stream.budget.sequences for s in sources])
        self._firsts = np.concatenate([[0], np.cumsum(self._sizes)]).astype(np.int64)
        self.total_positions = total_positions(int(self._sizes.sum()), epochs)
        self._union = Order("global", int(self._sizes.sum()), seed)
        self._draws = quantise([s.weight for s in sources], [s.name for s in sources])
        if mode == "weighted":
            self._set_lengths()
        for report in self.report():
            cap = report["max_epochs"]
            if cap is not None and report["epochs"] > cap:
                raise BudgetError(
                    f"source {report['name']} would be repeated {report['epochs']:.3f} times, its "
                    f"max_epochs is {cap}; lower its weight or epochs, or give it a larger budget"
                )

    @property
    def unique_tokens(self) -> int:
        """Tokens of all budgets together."""
        return sum(entry.stream.unique_tokens for entry in self.sources)

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences of all budgets together."""
        return int(self._sizes.sum())

    @property
    def epochs(self) -> float:
        """Epochs of the whole run, as realised: positions over the sequences of all budgets."""
        return self.total_positions / self.sequences_per_epoch

    @property
    def parts(self) -> list[tuple[str, TokenStream]]:
        """Name and stream of every source."""
        return [(entry.name, entry.stream) for entry in self.sources]

    def sequences_at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Source and sequence of its budget at each global position, int64 [k] each."""
        source, local = self._at(positions)
        if self.mode == "weighted":  # positions of each source's own stream
            for number, entry in enumerate(self.sources):
                rows = source == number
                local[rows] = entry.stream.order.at(local[rows])
        return source, local

    def plan(self, positions: IntArray) -> Plan:
        """Look up global positions, int64 [k], without reading."""
        source, local = self._at(positions)
        beyond = positions >= self.total_positions
        parts = []
        for number, entry in enumerate(self.sources):
            rows = np.flatnonzero(source == number)
            if self.mode == "weighted":
                parts.append(entry.stream.plan(local[rows]))
            else:
                parts.append(entry.stream.plan_sequences(local[rows], local[rows], beyond[rows]))
        valid = np.zeros(len(positions), np.int64)
        for number, part in enumerate(parts):
            valid[source == number] = part.valid
        return Plan(positions, (source, parts), valid, all(part.regular for part in parts))

    def take(self, plan: Plan, first: int, stop: int) -> TokenBatch:
        """Read planned rows [first, stop)."""
        source, parts = plan.located
        shape = (stop - first, self.seq_length)
        tokens, segment = np.empty(shape, np.int64), np.empty(shape, np.int32)
        valid = np.empty(shape, np.bool_)
        for number, entry in enumerate(self.sources):
            rows = np.flatnonzero(source[first:stop] == number)
            if len(rows):
                done = int((source[:first] == number).sum())
                part = entry.stream.take(parts[number], done, done + len(rows))
                tokens[rows], segment[rows] = part.tokens, part.segment
                valid[rows] = part.valid
        positions = plan.positions[first:stop]
        return TokenBatch(
            tokens,
            positions,
            segment,
            valid,
            all_valid=bool(valid.all()),
            one_segment=not segment.any(),
        )

    def read(self, positions: IntArray) -> TokenBatch:
        """Read the sequences at global positions, int64 [b]: plan and take at once."""
        return self.take(self.plan(positions), 0, len(positions))

    def num_valid(self, start: int, stop: int) -> int:
        """Count the valid target positions in [start, stop)."""
        start, stop = min(start, self.total_positions), min(stop, self.total_positions)
        if self.mode == "weighted":
            before, after = self.consumed(start), self.consumed(stop)
            return sum(
                entry.stream.num_valid(int(a), int(b))
                for entry, a, b in zip(self.sources, before, after, strict=True)
            )
        counts = 0
        for block in range(start, stop, 1 << 16):
            plan = self.plan(np.arange(block, min(block + (1 << 16), stop)))
            counts += self._valid_of(plan)
        return counts

    def epoch_of(self, position: int) -> float:
        """Passes over the sum of all budgets when `position` sequences were consumed."""
        return min(position, self.total_positions) / int(self._sizes.sum())

    def consumed(self, position: int) -> IntArray:
        """Sequences of each source before `position`, int64 [sources] (`weighted`)."""
        block, place = divmod(position, BLOCK)
        counts = block * self._draws
        if place:
            inside = self._block_sources(block)[:place]
            counts = counts + np.bincount(inside, minlength=len(self.sources))
        return counts

    def report(self) -> list[dict[str, Any]]:
        """Realised share and epochs of every source over the whole run."""
        if self.mode == "weighted":
            used = self.consumed(self.total_positions).astype(np.float64)
        else:
            used = self._sizes * (self.total_positions / self._sizes.sum())
        return [
            {
                "name": entry.name,
                "unique_tokens": entry.stream.budget.unique_tokens,
                "share": float(count) / self.total_positions,
                "epochs": float(count) / int(size),
                "max_epochs": entry.max_epochs,
            }
            for entry, count, size in zip(self.sources, used, self._sizes, strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """Values that must agree for a position to mean the same sequence."""
        parts = [entry.stream.fingerprint() for entry in self.sources]
        content = [self.mode, self._draws.tolist() if self.mode == "weighted" else [], parts]
        return {
            "order_version": ORDER_VERSION,
            "order": self.mode,
            "seed": self.seed,
            "manifest": sha256(canonical_json(content)).hexdigest(),
            "tokenizer": parts[0]["tokenizer"],
            "budget": sum(part["budget"] for part in parts),
            "seq_length": self.seq_length,
            "documents": parts[0]["documents"],
        }

    def _at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Source of each position, and the position (or sequence) inside that source."""
        if self.mode == "proportional":
            inside = np.minimum(positions, self.total_positions - 1)
            ids = self._union.at(inside)
            source = np.searchsorted(self._firsts, ids, "right") - 1
            return source, ids - self._firsts[source]
        blocks, places = np.divmod(positions, BLOCK)
        source, local = np.empty_like(places), np.empty_like(places)
        for block in np.unique(blocks):
            chosen = blocks == block
            drawn = self._block_sources(int(block))
            sources = drawn[places[chosen]]
            earlier = _ranks(drawn, len(self.sources))[places[chosen]]
            source[chosen] = sources
            local[chosen] = block * self._draws[sources] + earlier
        return source, local

    def _block_sources(self, block: int) -> IntArray:
        """Source of each of the 1024 positions of a block."""
        order = permute(np.arange(BLOCK), BLOCK, round_keys(self.seed, _MIXTURE, block))
        return np.repeat(np.arange(len(self.sources)), self._draws)[order]

    def _set_lengths(self) -> None:
        """Set the length of every source to the draws of this run."""
        for entry, count in zip(self.sources, self.consumed(self.total_positions), strict=True):
            entry.stream.total_positions = int(count)

    def _valid_of(self, plan: Plan) -> int:
        """Valid target positions of planned rows; masked documents have to be read."""
        if self.sources[0].stream.documents == "packed":
            return int(plan.valid.sum())
        counts = 0
        for first in range(0, len(plan.positions), 256):
            stop = min(first + 256, len(plan.positions))
            counts += int(self.take(plan, first, stop).valid.sum())
        return counts


def _ranks(drawn: IntArray, sources: int) -> IntArray:
    """Number of earlier entries of `drawn` that equal each entry."""
    ranks = np.empty_like(drawn)
    for number in range(sources):
        places = np.flatnonzero(drawn == number)
        ranks[places] = np.arange(len(places))
    return ranks


def quantise(weights: Sequence[float], names: Sequence[str]) -> IntArray:
    """Integers in proportion to `weights` that sum to `BLOCK` (largest remainders rounded up).

    DataError for weights that are not positive or too small for one draw a block.
    """
    shares = np.array(weights, np.float64)
    if not (np.isfinite(shares).all() and (shares > 0).all()):
        raise DataError(f"weights {list(weights)} must be positive numbers")
    exact = shares / shares.sum() * BLOCK
    draws = np.floor(exact).astype(np.int64)
    for index in np.argsort(-(exact - draws), kind="stable")[: BLOCK - int(draws.sum())]:
        draws[index] += 1
    missing = [name for name, count in zip(names, draws, strict=True) if count == 0]
    if missing:
        raise DataError(
            f"the weights of {', '.join(missing)} are below 1/{BLOCK} of the sum; "
            "raise them or leave these sources out"
        )
    return draws


def _check_sources(sources: Sequence[MixtureSource], mode: str) -> None:
    """Raise DataError unless the sources can be mixed in this mode."""
    if mode not in ("proportional", "weighted"):
        raise DataError(f"unknown mixture {mode!r}; allowed: proportional, weighted")
    if not sources:
        raise DataError("a mixture needs at least one source")
    for what in ("tokenizer", "seq_length", "documents"):
        found = {entry.name: entry.stream.fingerprint()[what] for entry in sources}
        if len(set(found.values())) > 1:
            raise DataError(f"the sources of a mixture differ in {what}: {found}")
