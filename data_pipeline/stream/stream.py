"""The stream of a run as a pure function: global sample position -> sequence of the budget.

Position g = epoch * n + place; ranks, workers and batch size do not enter, so every division of the
run into batches sees the same tokens. Positions beyond the end of the run give rows without a valid
token: they fill up the last global batch, so that shapes stay static and nothing is dropped or
repeated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget, total_positions
from data_pipeline.stream.documents import DocumentMode, SeparatorIndex, segments
from data_pipeline.stream.order import ORDER_VERSION, IntArray, Order


class TokenBatch(NamedTuple):
    """Clean sequences as numpy arrays, from which training makes its batches.

    Arrays are read-only by contract: `valid` and `segment` may be shared between batches.
    """

    tokens: IntArray
    """x0, int64 [b, s]; pad where invalid, except separators of `masked` documents."""
    position: IntArray
    """Global sample position g, int64 [b]."""
    segment: NDArray[np.int32]
    """Document number inside the sequence, int32 [b, s]; all 0 when documents are packed."""
    valid: NDArray[np.bool_]
    """Positions that are scored, bool [b, s]."""
    all_valid: bool
    """True if `valid` is True everywhere."""
    one_segment: bool
    """True if `segment` is 0 everywhere."""


@dataclass(frozen=True)
class Plan:
    """Positions that were looked up, with the addresses of their rows."""

    positions: IntArray
    located: Any
    """Addresses, for the stream that made the plan."""
    valid: IntArray
    """Leading positions of each row that are inside the budget."""
    regular: bool
    """True if every row is valid throughout and one segment."""


class Stream(Protocol):
    """Input of a loader: one budget (`TokenStream`) or a mixture of several."""

    seq_length: int
    total_positions: int

    @property
    def unique_tokens(self) -> int:
        """Tokens of one epoch."""
        ...

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences of one epoch."""
        ...

    @property
    def epochs(self) -> float:
        """Epochs of the whole run, as realised."""
        ...

    def report(self) -> list[dict[str, Any]]:
        """Realised share and epochs of every source, if there are several."""
        ...

    @property
    def parts(self) -> list[tuple[str, TokenStream]]:
        """Name and stream of every single pool in it."""
        ...

    def sequences_at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Part and sequence of that part's budget at each global position, int64 [k] each."""
        ...

    def plan(self, positions: IntArray) -> Plan:
        """Look up global positions, int64 [k], without reading."""
        ...

    def take(self, plan: Plan, first: int, stop: int) -> TokenBatch:
        """Read planned rows [first, stop)."""
        ...

    def read(self, positions: IntArray) -> TokenBatch:
        """Read the sequences at global positions, int64 [b]: plan and take at once."""
        ...

    def num_valid(self, start: int, stop: int) -> int:
        """Count the valid target positions in [start, stop)."""
        ...

    def epoch_of(self, position: int) -> float:
        """Epochs of the budget completed when `position` sequences were consumed."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Values that must agree for a position to mean the same sequence."""
        ...


class TokenStream:
    """A budget repeated for E epochs, in keyed order."""

    def __init__(
        self,
        pool: TokenPool,
        budget: Budget,
        *,
        seed: int,
        order: str = "global",
        documents: DocumentMode = "packed",
        epochs: float,
    ) -> None:
        """Repeat `budget` for `epochs`; fractional ones end after round(n * epochs) sequences.

        DataError for settings that are not allowed.
        """
        if not epochs > 0:
            raise DataError(f"epochs {epochs} must be positive")
        if documents not in ("packed", "masked"):
            raise DataError(f"unknown documents mode {documents!r}; allowed: packed, masked")
        self.pool, self.budget, self.documents = pool, budget, documents
        self.seq_length = budget.seq_length
        self.total_positions = total_positions(budget.sequences, epochs)
        block = max(1, pool.manifest.shard_tokens // budget.seq_length)
        self.order = Order(order, budget.sequences, seed, block)
        self._doc_id = pool.manifest.tokenizer.doc_id
        self._pad_id = pool.manifest.tokenizer.pad_id
        self._shared: tuple[NDArray[np.bool_], NDArray[np.int32]] | None = None
        self._tail: tuple[int, int] | None = None
        self._index = (
            SeparatorIndex(pool.manifest, pool.source.index(pool.manifest), verify=True)
            if documents == "masked"
            else None
        )

    @property
    def epochs(self) -> float:
        """Epochs of the whole run, as realised: positions over the sequences of the budget."""
        return self.total_positions / self.budget.sequences

    @property
    def unique_tokens(self) -> int:
        """Tokens of the budget, U."""
        return self.budget.unique_tokens

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences of the budget, n."""
        return self.budget.sequences

    def report(self) -> list[dict[str, Any]]:
        """Empty report: one budget has no shares."""
        return []

    @property
    def parts(self) -> list[tuple[str, TokenStream]]:
        """This stream, without a name."""
        return [("", self)]

    def sequences_at(self, positions: IntArray) -> tuple[IntArray, IntArray]:
        """Part (0) and sequence of the budget at each global position, int64 [k] each."""
        return np.zeros_like(positions), self.order.at(positions)

    def plan(self, positions: IntArray) -> Plan:
        """Look up global positions, int64 [k], without reading; best in blocks of thousands."""
        beyond = positions >= self.total_positions
        last = max(0, self.total_positions - 1)  # a short run may never draw from a mixed source
        inside = np.minimum(positions, last) if beyond.any() else positions
        return self.plan_sequences(positions, self.order.at(inside), beyond)

    def plan_sequences(self, positions: IntArray, ids: IntArray, beyond: NDArray[np.bool_]) -> Plan:
        """Look up sequences `ids` of the budget for rows whose positions are `positions`."""
        valid = np.full(len(positions), self.seq_length)
        if self.budget.tail_tokens < self.seq_length:
            valid[ids == self.budget.sequences - 1] = self.budget.tail_tokens
        valid[beyond] = 0
        regular = self.documents == "packed" and bool((valid == self.seq_length).all())
        return Plan(positions, self.pool.locate(ids, self.seq_length), valid, regular)

    def take(self, plan: Plan, first: int, stop: int) -> TokenBatch:
        """Read planned rows [first, stop)."""
        tokens = self.pool.rows(plan.located, first, stop).astype(np.int64)
        shape, positions = tokens.shape, plan.positions[first:stop]
        if plan.regular:
            valid, segment = self._everywhere(shape)
            return TokenBatch(tokens, positions, segment, valid, all_valid=True, one_segment=True)
        lengths = plan.valid[first:stop, None]
        valid = np.arange(self.seq_length) < lengths
        tokens[~valid] = self._pad_id
        segment = np.zeros(shape, np.int32)
        if self.documents == "masked":
            segment, separators = segments(tokens, self._doc_id)
            valid &= ~separators
        return TokenBatch(
            tokens,
            positions,
            segment,
            valid,
            all_valid=bool(valid.all()),
            one_segment=not segment.any(),
        )

    def read(self, positions: IntArray) -> TokenBatch:
        """Read the sequences at global positions, int64 [b]; rows beyond the run are invalid."""
        return self.take(self.plan(positions), 0, len(positions))

    def num_valid(self, start: int, stop: int) -> int:
        """Count the valid target positions in [start, stop).

        Takes O(1) for packed documents, O(stop - start) for masked ones.
        """
        start, stop = min(start, self.total_positions), min(stop, self.total_positions)
        count = (stop - start) * self.seq_length
        missing = self.seq_length - self.budget.tail_tokens
        if missing:
            count -= missing * (self._tail_visits(stop) - self._tail_visits(start))
        if self._index is not None:
            count -= self._separators(start, stop)
        return count

    def epoch_of(self, position: int) -> float:
        """Epochs of the budget completed when `position` sequences were consumed."""
        return min(position, self.total_positions) / self.budget.sequences

    def fingerprint(self) -> dict[str, Any]:
        """Values that must agree for a position to mean the same sequence."""
        tokenizer = self.pool.manifest.tokenizer
        return {
            "order_version": ORDER_VERSION,
            "order": self.order.kind,
            "seed": self.order.seed,
            "manifest": self.pool.manifest.sha256,
            "tokenizer": tokenizer.pieces_sha256,
            "budget": self.budget.unique_tokens,
            "seq_length": self.seq_length,
            "documents": self.documents,
        }

    def _everywhere(self, shape: tuple[int, ...]) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
        """`valid` and `segment` of rows that are valid throughout: one pair, made once."""
        shared = self._shared
        if shared is None or shared[0].shape != shape:
            shared = self._shared = (np.ones(shape, np.bool_), np.zeros(shape, np.int32))
        return shared

    def _tail_visits(self, position: int) -> int:
        """Visits of the last sequence of the budget before `position`."""
        n = self.budget.sequences
        epoch, place = divmod(position, n)
        if place == 0:
            return epoch
        tail = self._tail
        if tail is None or tail[0] != epoch:
            tail = self._tail = (epoch, self.order.find(n - 1, epoch))
        return epoch + (tail[1] < position)

    def _separators(self, start: int, stop: int) -> int:
        """Separators inside the budget that [start, stop) visits."""
        assert self._index is not None
        n, total = self.budget.sequences, 0
        limit = np.array([self.budget.unique_tokens])
        whole_from, whole_to = -(-start // n), stop // n
        pieces = [(start, stop)]
        if whole_from < whole_to:
            in_budget = int(self._index.count(np.zeros(1, np.int64), limit)[0])
            total += (whole_to - whole_from) * in_budget
            pieces = [(start, whole_from * n), (whole_to * n, stop)]
        for first, last in pieces:
            for block in range(first, last, 1 << 16):
                ids = self.order.at(np.arange(block, min(block + (1 << 16), last)))
                begin = ids * self.seq_length
                end = np.minimum(begin + self.seq_length, limit)
                total += int(self._index.count(begin, end).sum())
        return total
