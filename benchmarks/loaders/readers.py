"""One reader for every format: int64 batches [8, 2048], from the first pass to the last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from loaders.formats import SEQ_LENGTH, tokens_file

BATCH = 8
PASSES = 4
"""Measured passes; each reader makes one more before them."""


def read_memmap(root: Path, *, shuffle: bool) -> Iterator[Any]:
    """Memory-mapped rows of the flat file: the physical limit."""
    import torch

    rows = np.memmap(tokens_file(root), "<u2", "r").reshape(-1, SEQ_LENGTH)
    for epoch in range(PASSES + 1):
        rng = np.random.default_rng(epoch)
        order = rng.permutation(len(rows)) if shuffle else np.arange(len(rows))
        for i in range(0, len(rows), BATCH):
            yield torch.from_numpy(rows[order[i : i + BATCH]].astype(np.int64))


def read_epochal(root: Path, *, prefetch: int) -> Iterator[Any]:
    """This project's loader, global shuffle."""
    import torch

    from data_pipeline.shards.pool import TokenPool
    from data_pipeline.stream.budget import Budget
    from data_pipeline.stream.loader import BudgetLoader
    from data_pipeline.stream.stream import TokenStream

    pool = TokenPool(root / "epochal" / "manifest.json", verify="size")
    budget = Budget(None, SEQ_LENGTH, pool.num_tokens)
    stream = TokenStream(pool, budget, seed=1, epochs=PASSES + 1)
    sizes = {"global_batch_size": BATCH, "micro_batch_size": BATCH, "dp_rank": 0, "dp_size": 1}
    for batch in BudgetLoader(stream, **sizes, prefetch=prefetch):
        yield torch.from_numpy(batch.micro_batches[0].tokens)


def read_webdataset(root: Path, *, name: str) -> Iterator[Any]:
    """Plain webdataset, sequential, as its documentation shows."""
    import torch
    import webdataset

    urls = sorted(str(p) for p in (root / name).glob("*.tar"))

    def sequences(samples: Any) -> Any:
        for sample in samples:
            yield from np.frombuffer(sample["tok.bin"], "<u2").reshape(-1, SEQ_LENGTH)

    def collate(rows: Any) -> Any:
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    data = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).compose(sequences)
    for _ in range(PASSES + 1):
        yield from data.batched(BATCH, collation_fn=collate, partial=False)


def read_litdata(root: Path) -> Iterator[Any]:
    """LitData's StreamingDataset, shuffled."""
    import torch
    from litdata import StreamingDataset, TokensLoader

    loader = TokensLoader(block_size=SEQ_LENGTH)
    data = StreamingDataset(str(root / "litdata"), item_loader=loader, shuffle=True)
    rows: list[Any] = []
    for row in (row for _ in range(PASSES + 1) for row in data):
        rows.append(np.asarray(row))
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows = []


def read_mosaic(root: Path) -> Iterator[Any]:
    """MosaicML's StreamingDataset, shuffled."""
    import torch
    from streaming import StreamingDataset

    data = StreamingDataset(local=str(root / "mosaic"), shuffle=True, batch_size=BATCH)
    rows: list[Any] = []
    for sample in (sample for _ in range(PASSES + 1) for sample in data):
        rows.append(sample["tokens"])
        if len(rows) == BATCH:
            yield torch.from_numpy(np.stack(rows).astype(np.int64))
            rows = []


READERS: dict[str, tuple[str | None, Callable[[Path], Iterator[Any]]]] = {
    "numpy memmap, random": (None, lambda r: read_memmap(r, shuffle=True)),
    "numpy memmap, sequential": (None, lambda r: read_memmap(r, shuffle=False)),
    "epochal, global shuffle": (None, lambda r: read_epochal(r, prefetch=0)),
    "epochal, prefetch thread": (None, lambda r: read_epochal(r, prefetch=2)),
    "webdataset, 256 a member": ("webdataset", lambda r: read_webdataset(r, name="wds-group")),
    "webdataset, 1 a member": ("webdataset", lambda r: read_webdataset(r, name="wds-single")),
    "LitData": ("litdata", read_litdata),
    "MosaicML Streaming": ("streaming", read_mosaic),
}
