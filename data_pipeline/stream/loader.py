"""Global batches for one data-parallel rank, read ahead by one thread.

Reading is memory mapping and copying, so a thread keeps up with any GPU; worker processes would
spend more on messages than on work. The loader never counts what it read ahead: the run's position
is what the optimizer consumed.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.iterable import BATCHES_PER_MESSAGE, MessageSource, torch_dataset
from data_pipeline.stream.stream import Plan, Stream, TokenBatch, TokenStream

__all__ = ["BudgetLoader", "Cursor", "GlobalBatch", "Stream", "TokenBatch", "TokenStream"]

PLANNED_ROWS = 4096
"""Sequences whose order and addresses are computed together, whatever the batch size."""


class GlobalBatch(NamedTuple):
    """One optimizer step's positions, with this rank's share of the tokens."""

    start: int
    """First global position."""
    stop: int
    """Position after this step: what a cursor stores."""
    num_valid: int
    """Valid target positions of the whole global batch, over all ranks."""
    micro_batches: list[Any]
    """This rank's rows, `micro_batch_size` each (what `transform` made of them)."""


class BudgetLoader:
    """Iterates the global batches of a stream from `start_position` to the end of the run.

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
        workers: int = 0,
        transform: Callable[[TokenBatch], Any] | None = None,
    ) -> None:
        """`prefetch` is the number of global batches read ahead; 0 reads in the caller's thread.

        `transform` runs on every micro-batch where it is read, e.g. to pin it and start its copy
        to a GPU. `workers` processes (torch's DataLoader) fetch the tokens; 0 is the fast choice
        unless shards come over a network.
        """
        if global_batch_size % (micro_batch_size * dp_size):
            raise DataError(
                f"global_batch_size {global_batch_size} is not divisible by micro_batch_size "
                f"{micro_batch_size} x {dp_size} data-parallel ranks"
            )
        assert 0 <= dp_rank < dp_size
        assert start_position >= 0
        self.stream = stream
        self.global_batch_size, self.micro_batch_size = global_batch_size, micro_batch_size
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.start_position, self.prefetch = start_position, prefetch
        self.workers, self.transform = workers, transform
        self._readers: list[_ReadAhead] = []

    def __len__(self) -> int:
        """Global batches left."""
        left = max(0, self.stream.total_positions - self.start_position)
        return -(-left // self.global_batch_size)

    def __iter__(self) -> Iterator[GlobalBatch]:
        """The batches in order; leaving the loop early ends the reading thread."""
        if self.prefetch == 0:
            yield from self._batches()
            return
        reader = _ReadAhead(self._batches(), self.prefetch)
        self._readers.append(reader)
        try:
            yield from reader
        finally:
            reader.close()
            self._readers.remove(reader)

    def close(self) -> None:
        """End every reading thread of this loader."""
        for reader in self._readers:
            reader.close()

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
        if self.workers:
            yield from self._batches_of_workers()
            return
        per_rank = self.global_batch_size // self.dp_size
        together = max(1, PLANNED_ROWS // per_rank)
        own = self.dp_rank * per_rank + np.arange(per_rank)
        for block in range(0, len(self), together):
            batches = range(block, min(block + together, len(self)))
            starts = self.start_position + np.array(batches) * self.global_batch_size
            plan = self.stream.plan((starts[:, None] + own).ravel())
            take = partial(self.stream.take, plan)
            for number, batch in enumerate(batches):
                yield self._cut(batch, number * per_rank, take)

    def _batches_of_workers(self) -> Iterator[GlobalBatch]:
        """Tokens arrive in large messages of the stored type; only the cast happens here."""
        from torch.utils.data import DataLoader

        stream = self.stream
        if not isinstance(stream, TokenStream):
            raise DataError("worker processes read single budgets only; use workers=0 for mixtures")
        source = MessageSource(
            stream,
            global_batch_size=self.global_batch_size,
            dp_rank=self.dp_rank,
            dp_size=self.dp_size,
            start_position=self.start_position,
        )
        messages = DataLoader(torch_dataset(source), batch_size=None, num_workers=self.workers)
        per_rank = self.global_batch_size // self.dp_size
        for number, message in enumerate(messages):
            stored, plan = message.numpy(), stream.plan(source.message_positions(number))

            def take(
                first: int, stop: int, plan: Plan = plan, stored: NDArray[Any] = stored
            ) -> TokenBatch:
                return stream.finish(plan, first, stored[first:stop])

            for row in range(0, len(stored), per_rank):
                batch = number * BATCHES_PER_MESSAGE + row // per_rank
                yield self._cut(batch, row, take)

    def _cut(self, batch: int, first: int, take: Callable[[int, int], TokenBatch]) -> GlobalBatch:
        """One global batch whose rows of this rank begin at `first` of what `take` reads."""
        start = self.start_position + batch * self.global_batch_size
        stop = min(start + self.global_batch_size, self.stream.total_positions)
        micro, last = self.micro_batch_size, first + self.global_batch_size // self.dp_size
        parts = [take(row, row + micro) for row in range(first, last, micro)]
        if self.transform is not None:
            parts = [self.transform(part) for part in parts]
        return GlobalBatch(start, stop, self.stream.num_valid(start, stop), parts)


class _ReadAhead:
    """Runs an iterator in a thread that stays at most `depth` items ahead of the consumer."""

    def __init__(self, items: Iterator[GlobalBatch], depth: int) -> None:
        self._items, self._depth = items, depth
        self._ready: deque[GlobalBatch] = deque()
        self._changed = threading.Condition()
        self._stopped, self._finished = False, False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="read-ahead", daemon=True)
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
