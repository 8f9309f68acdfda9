"""The stream for others: plain webdataset, and a webdataset pipeline in the exact order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset
from torch.utils.data import DataLoader

from data_pipeline.errors import DataError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.iterable import StreamSource
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture
def stream(make_pool: PoolMaker) -> TokenStream:
    pool = TokenPool(make_pool()[0])
    return TokenStream(pool, Budget(4321, 64, pool.num_tokens), seed=5, epochs=12)


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_workers_of_a_dataloader_keep_the_order(stream: TokenStream, workers: int) -> None:
    source = StreamSource(stream, global_batch_size=20, start_position=7)
    pipeline = webdataset.DataPipeline(source)
    batches = list(DataLoader(pipeline, batch_size=None, num_workers=workers))
    assert len(batches) == len(source)
    positions = np.concatenate([np.asarray(batch.position) for batch in batches])
    assert positions.tolist() == list(range(7, 7 + 20 * len(source)))
    assert np.array_equal(
        np.concatenate([np.asarray(batch.tokens) for batch in batches]),
        stream.read(positions).tokens,
    )


def test_ranks_of_a_webdataset_pipeline_share_every_batch(stream: TokenStream) -> None:
    sums = []
    for rank in (0, 1):
        source = StreamSource(stream, global_batch_size=24, dp_rank=rank, dp_size=2)
        pipeline = webdataset.DataPipeline(source, webdataset.map(lambda batch: batch.tokens.sum()))
        sums.append([int(value) for value in pipeline])
    whole = StreamSource(stream, global_batch_size=24)
    expected = [int(batch.tokens.sum()) for batch in whole]
    assert [a + b for a, b in zip(*sums, strict=True)] == expected


def test_plain_webdataset_reads_every_sequence_of_the_pool(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool(4608)
    names = [str(manifest.parent / s.name) for s in Manifest.load(manifest).shards]

    def sequences(samples: object) -> object:
        for sample in samples:  # type: ignore[attr-defined]
            yield from np.frombuffer(sample["tok.bin"], "<u2").reshape(-1, 64)

    read = list(webdataset.WebDataset(names, shardshuffle=False).compose(sequences))
    assert np.array_equal(np.stack(read), tokens.reshape(-1, 64))


def test_indivisible_ranks_are_refused(stream: TokenStream) -> None:
    with pytest.raises(DataError, match="24 is not divisible by 5 data-parallel ranks"):
        StreamSource(stream, global_batch_size=24, dp_rank=0, dp_size=5)
