"""Global batches for one data-parallel rank, prefetched by one thread.

Reading is memory mapping and copying, so one thread keeps up with any GPU. Prefetched batches never
count as read: the position of a run is the number of sequences that the optimizer consumed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.stream.stream import Plan, Stream

PLANNED_ROWS = 4096
"""Sequences whose order and addresses are computed together, whatever the batch size."""


class GlobalBatch(NamedTuple):
    """Positions of one optimizer step, with this rank's share of the tokens."""

    start: int
    """First global position."""
    stop: int
    """Position after this step: the one that a cursor stores."""
    num_valid: int
    """Valid target positions of the whole global batch, over all ranks."""
    micro_batches: list[Any]
    """This rank's rows, `micro_batch_size` each: `TokenBatch`, or what training makes of it."""


def rows_per_rank(global_batch_size: int, dp_size: int, micro_batch_size: int = 1) -> int:
    """Number of rows of a global batch that each rank reads; DataError unless it is whole."""
    if global_batch_size % (micro_batch_size * dp_size):
        raise DataError(
            f"global_batch_size {global_batch_size} is not divisible by {dp_size} data-parallel "
            f"ranks x micro-batches of {micro_batch_size}"
        )
    return global_batch_size // dp_size


class BudgetLoader:
    """Iterable of the global batches of a stream, from `start_position` to the end of the run.

    Rank r holds rows [r * B / R, (r + 1) * B / R) of each batch, so putting the ranks' rows one
    after the other gives the same stream for every R. The last batch is filled up with invalid
    rows. Every iteration starts again at `start_position`.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int,
        dp_size: int,
        start_position: int = 0,
        prefetch: int = 2,
    ) -> None:
        """Read `prefetch` global batches in advance; 0 reads in the caller's thread.

        DataError unless micro-batches and ranks divide the global batch.
        """
        self.rows = rows_per_rank(global_batch_size, dp_size, micro_batch_size)
        assert 0 <= dp_rank < dp_size
        assert start_position >= 0
        self.stream = stream
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.start_position, self.prefetch = start_position, prefetch
        self._prefetchers: list[_Prefetcher] = []

    def __len__(self) -> int:
        """Number of global batches that are left."""
        left = max(0, self.stream.total_positions - self.start_position)
        return -(-left // self.global_batch_size)

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Yield the batches in order; leaving the loop early ends the prefetching thread."""
        if self.prefetch == 0:
            yield from self._batches()
            return
        prefetcher = _Prefetcher(self._batches(), self.prefetch)
        self._prefetchers.append(prefetcher)
        try:
            yield from prefetcher
        finally:
            prefetcher.close()
            self._prefetchers.remove(prefetcher)

    def close(self) -> None:
        """End every prefetching thread of this loader."""
        for prefetcher in self._prefetchers:
            prefetcher.close()

    def __enter__(self) -> BudgetLoader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _batches(self) -> Iterator[GlobalBatch]:
        """Plan blocks of many batches at once, read one micro-batch at a time."""
        rows = self.rows
        rows_of_rank = self.dp_rank * rows + np.arange(rows)
        batches_per_plan = max(1, PLANNED_ROWS // rows)
        for block in range(0, len(self), batches_per_plan):
            batches = np.arange(block, min(block + batches_per_plan, len(self)))
            starts = self.start_position + batches * self.global_batch_size
            plan = self.stream.plan((starts[:, None] + rows_of_rank).ravel())
            for number, start in enumerate(starts.tolist()):
                yield self._read(plan, number * rows, start)

    def _read(self, plan: Plan, first: int, start: int) -> GlobalBatch:
        """Read the batch at position `start`, whose rows begin at row `first` of the plan."""
        stop = min(start + self.global_batch_size, self.stream.total_positions)
        micro, last = self.micro_batch_size, first + self.rows
        parts = [self.stream.take(plan, row, row + micro) for row in range(first, last, micro)]
        return GlobalBatch(start, stop, self.stream.num_valid(start, stop), parts)


class _Prefetcher:
    """Iterator that a thread runs, at most `depth` items before the consumer."""

    def __init__(self, items: Iterator[GlobalBatch], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[GlobalBatch] = deque()
        self._changed = threading.Condition()
        self._stopped, self._finished = False, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[GlobalBatch]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._ready or self._finished or self._stopped)
                if not self._ready:
                    if self._error is not None:
                        raise self._error
                    return
                item = self._ready.popleft()
                self._changed.notify_all()
            yield item

    def close(self) -> None:
        """Stop reading and wait for the thread."""
        with self._changed:
            self._stopped = True
            self._ready.clear()
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        """Fill the queue; an error is raised by the consumer, after the items before it."""
        try:
            for item in self._items:
                with self._changed:
                    self._changed.wait_for(lambda: len(self._ready) < self._depth or self._stopped)
                    if self._stopped:
                        return
                    self._ready.append(item)
                    self._changed.notify_all()
        except BaseException as error:
            self._error = error
        finally:
            with self._changed:
                self._finished = True
                self._changed.notify_all()
