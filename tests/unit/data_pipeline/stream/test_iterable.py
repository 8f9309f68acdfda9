"""Three ways of reading: plain webdataset, a pipeline in the exact order, the loader."""

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
from data_pipeline.stream import iterable, loader
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.iterable import StreamSource, torch_dataset
from data_pipeline.stream.loader import BudgetLoader
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


@pytest.fixture
def stream(make_pool: PoolMaker) -> TokenStream:
    pool = TokenPool(make_pool()[0])
    return TokenStream(pool, Budget(4321, 64, pool.num_tokens), seed=5, epochs=12)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
def test_ranks_and_workers_do_not_change_the_stream(
    stream: TokenStream, workers: int, dp_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Messages are made short, so that every worker sends several and the last is shorter."""
    for module in (iterable, loader):
        monkeypatch.setattr(module, "BATCHES_PER_MESSAGE", 4)
    expected = stream.read(np.arange(-(-stream.total_positions // 24) * 24))
    loaders = [
        BudgetLoader(
            stream,
            global_batch_size=24,
            micro_batch_size=1,
            dp_rank=rank,
            dp_size=dp_size,
            workers=workers,
        )
        for rank in range(dp_size)
    ]
    steps = zip(*loaders, strict=True)
    parts = [m for step in steps for batch in step for m in batch.micro_batches]
    for field in ("tokens", "position", "valid", "segment"):
        joined = np.concatenate([getattr(part, field) for part in parts])
        assert np.array_equal(joined, getattr(expected, field))


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_dataloader_over_the_plain_iterable_keeps_the_order(
    stream: TokenStream, workers: int
) -> None:
    source = StreamSource(stream, global_batch_size=20, start_position=7)
    batches = list(DataLoader(torch_dataset(source), batch_size=None, num_workers=workers))
    assert len(batches) == len(source)
    positions = np.concatenate([np.asarray(batch.position) for batch in batches])
    assert positions.tolist() == list(range(7, 7 + 20 * len(source)))
    assert np.array_equal(
        np.concatenate([np.asarray(batch.tokens) for batch in batches]),
        stream.read(positions).tokens,
    )


def test_webdataset_pipeline_on_top_of_the_exact_order(stream: TokenStream) -> None:
    source = StreamSource(stream, global_batch_size=24, dp_rank=1, dp_size=2)
    pipeline = webdataset.DataPipeline(source, webdataset.map(lambda batch: batch.tokens.sum()))
    sums = [int(value) for value in pipeline]
    assert sums == [int(batch.tokens.sum()) for batch in source]
    assert len(sums) == len(source)


def test_plain_webdataset_reads_every_sequence_of_the_pool(make_pool: PoolMaker) -> None:
    manifest, tokens = make_pool(4608)
    names = [str(manifest.parent / s.name) for s in Manifest.load(manifest).shards]

    def sequences(samples: object) -> object:
        for sample in samples:  # type: ignore[attr-defined]
            yield from np.frombuffer(sample["tok.bin"], "<u2").reshape(-1, 64)

    read = list(webdataset.WebDataset(names, shardshuffle=False).compose(sequences))
    assert np.array_equal(np.stack(read), tokens.reshape(-1, 64))


def test_transform_runs_on_every_micro_batch_in_the_reading_thread(stream: TokenStream) -> None:
    loader = BudgetLoader(
        stream,
        global_batch_size=24,
        micro_batch_size=8,
        dp_rank=0,
        dp_size=1,
        transform=lambda batch: int(batch.position[0]),
    )
    assert [b.micro_batches for b in loader][:2] == [[0, 8, 16], [24, 32, 40]]


def test_indivisible_ranks_are_refused(stream: TokenStream) -> None:
    with pytest.raises(DataError, match="not divisible by 5 ranks"):
        StreamSource(stream, global_batch_size=24, dp_rank=0, dp_size=5)
