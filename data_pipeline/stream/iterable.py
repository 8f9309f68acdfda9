"""The exact order for other pipelines: `webdataset`, torch's DataLoader, or a plain loop.

`StreamSource` is an iterable of batches that any pipeline can start from. DataLoader workers take
the global batches in turn, which DataLoader's round-robin collection puts back in order; so the
stream depends neither on the ranks nor on the workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.stream.stream import Stream, TokenBatch, TokenStream

BATCHES_PER_MESSAGE = 32
"""Global batches of one inter-process message: each costs about a millisecond."""


class StreamSource:
    """One rank's rows of every global batch, as `TokenBatch`es; iterate it as often as you like.

    With `wds.DataPipeline(source, wds.map(fn))` it is the first stage of a webdataset pipeline.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        global_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        start_position: int = 0,
    ) -> None:
        """Raises DataError unless the ranks divide the global batch."""
        if global_batch_size % dp_size:
            raise DataError(
                f"global_batch_size {global_batch_size} is not divisible by {dp_size} ranks"
            )
        self.stream, self.global_batch_size = stream, global_batch_size
        self.dp_rank, self.dp_size, self.start_position = dp_rank, dp_size, start_position

    def __len__(self) -> int:
        """Global batches left."""
        left = max(0, self.stream.total_positions - self.start_position)
        return -(-left // self.global_batch_size)

    def positions(self, batch: int) -> np.ndarray:
        """Global positions of this rank's rows of a batch, counted from the start position."""
        rows = self.global_batch_size // self.dp_size
        first = self.start_position + batch * self.global_batch_size + self.dp_rank * rows
        return np.arange(first, first + rows)

    def __iter__(self) -> Iterator[TokenBatch]:
        worker, workers = _worker()
        for batch in range(worker, len(self), workers):
            yield self.stream.read(self.positions(batch))

    def __call__(self) -> Iterator[TokenBatch]:
        """What a webdataset pipeline calls on its first stage."""
        return iter(self)


class MessageSource(StreamSource):
    """The same rows in messages of many batches and in the stored type, to be finished outside."""

    stream: TokenStream

    def __iter__(self) -> Iterator[Any]:
        """torch tensors [batches * rows, s] in shared memory, in the stored integer type."""
        import torch

        worker, workers = _worker()
        messages = -(-len(self) // BATCHES_PER_MESSAGE)
        for message in range(worker, messages, workers):
            plan = self.stream.plan(self.message_positions(message))
            yield torch.from_numpy(self.stream.fetch(plan, 0, len(plan.positions)))

    def message_positions(self, message: int) -> np.ndarray:
        """Global positions of all rows of a message."""
        first = message * BATCHES_PER_MESSAGE
        last = min(first + BATCHES_PER_MESSAGE, len(self))
        return np.concatenate([self.positions(batch) for batch in range(first, last)])


def torch_dataset(source: StreamSource) -> Any:
    """`source` as a torch IterableDataset, for DataLoader(batch_size=None, num_workers=...)."""
    from torch.utils.data import IterableDataset

    class Samples(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            return iter(source)

    return Samples()


def _worker() -> tuple[int, int]:
    """Number of this DataLoader worker, and of how many; torch is only asked if it is loaded."""
    data = sys.modules.get("torch.utils.data")
    info = data.get_worker_info() if data is not None else None
    return (info.id, info.num_workers) if info is not None else (0, 1)
