"""One stream for every world size, resumable anywhere, and threads that end."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.loader import BudgetLoader
from data_pipeline.stream.stream import Plan, TokenBatch, TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]


def make_stream(manifest: Path, unique: int = 4321, **options: Any) -> TokenStream:
    pool = TokenPool(manifest)
    defaults = {"seed": 5, "epochs": 2.2}
    return TokenStream(pool, Budget(unique, 64, pool.num_tokens), **{**defaults, **options})


def make_loader(stream: TokenStream, **options: Any) -> BudgetLoader:
    defaults = {"global_batch_size": 24, "micro_batch_size": 1, "dp_rank": 0, "dp_size": 1}
    return BudgetLoader(stream, **{**defaults, **options})


def join(batches: list[TokenBatch]) -> tuple[np.ndarray, ...]:
    fields = ("tokens", "position", "segment", "valid")
    return tuple(np.concatenate([getattr(b, field) for b in batches]) for field in fields)


def rows_of_step(stream: TokenStream, step: int, dp_size: int, micro: int) -> list[TokenBatch]:
    parts = []
    for rank in range(dp_size):
        loader = make_loader(
            stream,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=micro,
            start_position=step * 24,
            prefetch=0,
        )
        parts += next(iter(loader)).micro_batches
    return parts


@pytest.mark.parametrize("documents", ["packed", "masked"])
@pytest.mark.parametrize("dp_size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_all_world_sizes_deliver_the_same_stream(
    make_pool: PoolMaker, dp_size: int, prefetch: int, documents: str
) -> None:
    stream = make_stream(make_pool()[0], documents=documents)
    loaders = [
        make_loader(stream, dp_rank=r, dp_size=dp_size, prefetch=prefetch) for r in range(dp_size)
    ]
    steps = list(zip(*loaders, strict=True))
    assert len(steps) == -(-stream.total_positions // 24)
    got = join([m for step in steps for rank in step for m in rank.micro_batches])
    expected = join([stream.read(np.arange(len(steps) * 24))])
    assert all(np.array_equal(a, b) for a, b in zip(got, expected, strict=True))
    valid = sum(m.valid.sum() for step in steps for rank in step for m in rank.micro_batches)
    assert sum(step[0].num_valid for step in steps) == valid


def test_stop_anywhere_and_resume_with_other_ranks_and_batch_size(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool()[0])
    whole = stream.read(np.arange(stream.total_positions)).tokens
    for stop in (1, 2, 3, 5):
        first = list(make_loader(stream))[:stop]
        position = first[-1].stop
        rest = [
            list(
                make_loader(
                    stream,
                    global_batch_size=20,
                    micro_batch_size=5,
                    dp_rank=r,
                    dp_size=4,
                    start_position=position,
                )
            )
            for r in range(4)
        ]
        tokens = [m.tokens for batch in first for m in batch.micro_batches]
        for step in zip(*rest, strict=True):
            tokens += [m.tokens for rank in step for m in rank.micro_batches]
        assert np.array_equal(np.concatenate(tokens)[: stream.total_positions], whole)


def test_lengthening_a_run_continues_without_gap_or_repeat(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    short, long = make_stream(manifest, epochs=1), make_stream(manifest, epochs=3)
    last = list(make_loader(short))[-1]
    assert last.stop == short.total_positions
    assert last.stop % 24 != 0
    Cursor.at(short, last.stop).check(long)
    nxt = next(iter(make_loader(long, start_position=last.stop)))
    assert nxt.start == short.total_positions
    expected = long.read(np.arange(nxt.start, nxt.start + 24)).tokens
    assert np.array_equal(join(nxt.micro_batches)[0], expected)


@pytest.mark.parametrize(("dp_size", "micro"), [(1, 1), (1, 24), (2, 3), (4, 2), (8, 3)])
def test_micro_batches_only_divide_the_rows(make_pool: PoolMaker, dp_size: int, micro: int) -> None:
    stream = make_stream(make_pool()[0])
    parts = rows_of_step(stream, 3, dp_size, micro)
    assert [len(p.tokens) for p in parts] == [micro] * (24 // micro)
    assert np.array_equal(join(parts)[0], stream.read(np.arange(72, 96)).tokens)


def test_iterating_again_starts_again(make_pool: PoolMaker) -> None:
    loader = make_loader(make_stream(make_pool()[0]), start_position=48)
    assert [b.start for b in loader] == [b.start for b in loader]
    assert len(list(loader)) == len(loader)


def test_finished_run_gives_no_batch(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool()[0])
    assert list(make_loader(stream, start_position=stream.total_positions)) == []
    assert len(make_loader(stream, start_position=10**9)) == 0


def prefetching_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "prefetch"]


def test_thread_ends_when_the_consumer_breaks_raises_or_finishes(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool()[0])
    for _ in make_loader(stream):
        break
    gc.collect()
    assert not prefetching_threads()

    def consume_and_fail() -> None:
        with make_loader(stream) as loader:
            for _ in loader:
                raise RuntimeError("consumer")

    with pytest.raises(RuntimeError, match="consumer"):
        consume_and_fail()
    assert not prefetching_threads()
    list(make_loader(stream))
    assert not prefetching_threads()
    loader = make_loader(stream)
    iterator = iter(loader)
    next(iterator)
    loader.close()
    assert not prefetching_threads()
    assert list(iterator) == []


def test_error_in_the_thread_reaches_the_consumer_in_order(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool()[0], epochs=9)
    good = stream.take

    def failing(plan: Plan, first: int, stop: int) -> TokenBatch:
        if plan.positions[first] >= 240:
            raise OSError("disk on fire")
        return good(plan, first, stop)

    stream.take = failing  # type: ignore[method-assign]
    seen: list[int] = []
    with pytest.raises(OSError, match="on fire"):
        seen.extend(batch.start for batch in make_loader(stream))
    assert seen == list(range(0, 240, 24))
    assert not prefetching_threads()


def test_prefetching_stays_within_its_depth(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool(60_000)[0], unique=60_000)
    reads: list[int] = []
    good = stream.take
    stream.take = lambda *a: (reads.append(1), good(*a))[1]  # type: ignore[method-assign]
    for count, _ in enumerate(make_loader(stream, micro_batch_size=24, prefetch=2), 1):
        assert len(reads) <= count + 3
    assert len(reads) == count > 30


def test_indivisible_batches_are_refused(make_pool: PoolMaker) -> None:
    stream = make_stream(make_pool()[0])
    with pytest.raises(DataError, match=r"24 is not divisible by 1 .* micro-batches of 5"):
        make_loader(stream, micro_batch_size=5)
