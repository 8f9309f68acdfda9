"""A pool of 10 billion tokens opens at once, and memory does not depend on the budget."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.pool import TokenPool
from data_pipeline.shards.shards import END_BYTES, HEADER_BYTES, MEMBER_BYTES
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.loader import BudgetLoader
from data_pipeline.stream.stream import TokenStream

MEMBER_TOKENS, PER_SHARD = MEMBER_BYTES // 2, 128


@pytest.fixture
def make_large_pool(make_pool: Any, tmp_path: Path) -> Any:
    """Sparse shards: the sizes are real, the disk holds next to nothing."""
    template = Manifest.load(make_pool()[0])

    def make(tokens: int) -> Path:
        folder = tmp_path / f"large-{tokens}"
        folder.mkdir()
        shards, shard_tokens = [], MEMBER_TOKENS * PER_SHARD
        for index in range(-(-tokens // shard_tokens)):
            held = min(shard_tokens, tokens - index * shard_tokens)
            members = -(-held // MEMBER_TOKENS)
            padded = -(-2 * held // HEADER_BYTES) * HEADER_BYTES
            record = template.shards[0].model_copy(
                update={
                    "name": f"train-{index:06d}.tar",
                    "bytes": members * HEADER_BYTES + padded + END_BYTES,
                    "tokens": held,
                    "first": index * shard_tokens,
                    "member_xxh3": ("0" * 16,) * members,
                }
            )
            with open(folder / record.name, "wb") as file:
                file.truncate(record.bytes)
            shards.append(record)
        changes = {
            "tokens": tokens,
            "member_tokens": MEMBER_TOKENS,
            "members_per_shard": PER_SHARD,
            "sources": (),
            "shards": tuple(shards),
        }
        manifest = Manifest.model_validate({**template.model_dump(), **changes})
        (folder / "manifest.json").write_text(manifest.to_json())
        return folder / "manifest.json"

    return make


def first_batches(path: Path, count: int) -> tuple[NDArray[np.int64], int]:
    """Open a pool, read `count` batches; the positions read and the peak of Python's memory."""
    tracemalloc.start()
    pool = TokenPool(path, verify="size")
    stream = TokenStream(pool, Budget(None, 2048, pool.num_tokens), seed=1, epochs=100)
    middle = stream.total_positions // 2
    sizes = {"global_batch_size": 8, "micro_batch_size": 8, "dp_rank": 0, "dp_size": 1}
    loader = iter(BudgetLoader(stream, **sizes, start_position=middle, prefetch=0))
    read = [next(loader).micro_batches[0].position for _ in range(count)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return np.concatenate(read), peak


def test_memory_is_that_of_the_manifest_not_of_the_budget(make_large_pool: Any) -> None:
    """Resuming in the middle of 100 epochs of 10 billion tokens: a permutation would take 40 MB."""
    small, small_peak = first_batches(make_large_pool(200_000_000), 4)
    large, large_peak = first_batches(make_large_pool(10_000_000_000), 4)
    assert len(large) == len(small) == 32
    assert large_peak < small_peak + 16_000_000
    assert large[0] == 100 * -(-10_000_000_000 // 2048) // 2


def test_addresses_at_the_far_end_of_a_large_pool(make_large_pool: Any) -> None:
    """Offsets beyond 4 GB: a token written where the format says is read where it belongs."""
    path = make_large_pool(10_000_000_000)
    sequence = 4_800_000
    member, inner = divmod(sequence * 2048, MEMBER_TOKENS)
    shard, member = divmod(member, PER_SHARD)
    offset = member * (HEADER_BYTES + MEMBER_BYTES) + HEADER_BYTES + 2 * inner
    with open(path.parent / f"train-{shard:06d}.tar", "r+b") as file:
        file.seek(offset)
        file.write(np.arange(2048, dtype="<u2").tobytes())
    pool = TokenPool(path, verify="size")
    row = pool.rows(pool.locate(np.array([sequence]), 2048), 0, 1)[0]
    assert np.array_equal(row, np.arange(2048))
