"""The exact order for other trainers: the first stage of a `webdataset` pipeline, or a plain loop.

DataLoader workers take the global batches in turn, which DataLoader's round-robin collection puts
back in order; so the stream depends neither on the ranks nor on the workers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import numpy as np

from data_pipeline.stream.loader import rows_per_rank
from data_pipeline.stream.order import IntArray
from data_pipeline.stream.stream import Stream, TokenBatch


class StreamSource:
    """Rows of one rank in every global batch, as one `TokenBatch` each; may be iterated again.

    `wds.DataPipeline(source, wds.map(fn))` is a webdataset pipeline, and thereby a dataset for
    torch's DataLoader.
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
        """Begin at `start_position`; DataError unless the ranks divide the global batch."""
        self.rows = rows_per_rank(global_batch_size, dp_size)
        self.stream, self.global_batch_size = stream, global_batch_size
        self.dp_rank, self.dp_size, self.start_position = dp_rank, dp_size, start_position

    def __len__(self) -> int:
        """Number of global batches that are left."""
        left = max(0, self.stream.total_positions - self.start_position)
        return -(-left // self.global_batch_size)

    def positions(self, batch: int) -> IntArray:
        """Global positions, int64 [rows], of this rank's rows of the `batch`-th batch from here."""
        first = self.start_position + batch * self.global_batch_size + self.dp_rank * self.rows
        return np.arange(first, first + self.rows)

    def __iter__(self) -> Iterator[TokenBatch]:
        worker, workers = _worker()
        for batch in range(worker, len(self), workers):
            yield self.stream.read(self.positions(batch))

    def __call__(self) -> Iterator[TokenBatch]:
        """Iterate: a webdataset pipeline calls its first stage."""
        return iter(self)


def _worker() -> tuple[int, int]:
    """Number of this DataLoader worker, and number of workers; asks torch only if it is loaded."""
    data = sys.modules.get("torch.utils.data")
    info = data.get_worker_info() if data is not None else None
    return (info.id, info.num_workers) if info is not None else (0, 1)
