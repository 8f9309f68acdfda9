"""Prefetch of training batches: each is made while the device works on the one before.

Drawing noise takes the host some milliseconds a micro-batch, in which a GPU would have nothing to
do. So the engine asks for one micro-batch of the next step after every forward pass of the present
one, before anything waits for the device. This never changes a batch: it is a function of its clean
tokens and of the objective's state. If that state has changed since (an evaluation may move block
diffusion's interval), prefetched batches are dropped and made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from data_pipeline.stream.loader import GlobalBatch
from data_pipeline.stream.stream import TokenBatch
from pretrain.batch import TrainBatch


class PrefetchedBatches:
    """Iterable of global batches whose micro-batches are `TrainBatch`."""

    def __init__(
        self,
        clean: Iterable[GlobalBatch],
        make: Callable[[TokenBatch], TrainBatch],
        state: Callable[[], object],
    ) -> None:
        """Set up: `make` turns clean tokens into a training batch; it may also read `state()`."""
        self._clean, self._make, self._state = iter(clean), make, state
        self._next: GlobalBatch | None = None
        self._made: list[TrainBatch] = []
        self._state_of_made: object = None
        self._error: Exception | None = None

    def __iter__(self) -> Iterator[GlobalBatch]:
        while (batch := self._take()) is not None:
            yield batch

    def prefetch(self) -> None:
        """Make one more micro-batch of the next step, if one is left to make.

        An error belongs to the next step, and is raised when that begins.
        """
        if self._error is None:
            try:
                self._make_one()
            except Exception as error:
                self._error = error

    def _take(self) -> GlobalBatch | None:
        """Batch of the next step, complete; None after the last."""
        if self._error is not None:
            raise self._error
        if self._state_of_made != self._state():
            self._made = []
        while self._make_one():
            pass
        batch, made = self._next, self._made
        self._next, self._made = None, []
        return None if batch is None else batch._replace(micro_batches=made)

    def _make_one(self) -> bool:
        """Make a micro-batch of the next step; False if none was left to make."""
        if self._next is None:
            self._next = next(self._clean, None)
        if self._next is None or len(self._made) == len(self._next.micro_batches):
            return False
        if not self._made:
            self._state_of_made = self._state()
        self._made.append(self._make(self._next.micro_batches[len(self._made)]))
        return True
