"""A run sees exactly its budget: each token E times, nothing else, wherever it is interrupted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BudgetError, DataError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
DOC, PAD = 5, 0
LOCAL_FIXTURE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def make_stream(manifest: Path, unique: int | None, length: int, **options: object) -> TokenStream:
    pool = TokenPool(manifest)
    budget = Budget(unique, length, pool.num_tokens)
    return TokenStream(pool, budget, **{"seed": 3, "epochs": 1, **options})  # type: ignore[arg-type]


@given(unique=st.integers(1, 5000), length=st.integers(1, 700), epochs=st.integers(1, 3))
@LOCAL_FIXTURE
def test_every_budgeted_token_is_scored_exactly_e_times(
    make_pool: PoolMaker, unique: int, length: int, epochs: int
) -> None:
    manifest, tokens = make_pool()
    stream = make_stream(manifest, unique, length, epochs=epochs)
    visits = np.zeros(5000, np.int64)
    ids = stream.order.at(np.arange(stream.total_positions))
    batch = stream.read(np.arange(stream.total_positions))
    for row, sequence in enumerate(ids):
        places = sequence * length + np.flatnonzero(batch.valid[row])
        visits[places] += 1
        assert np.array_equal(batch.tokens[row][batch.valid[row]], tokens[places])
    assert (visits[:unique] == epochs).all()
    assert (visits[unique:] == 0).all()
    assert (batch.tokens[~batch.valid] == PAD).all()
    assert stream.num_valid(0, stream.total_positions) == unique * epochs


@pytest.mark.parametrize("order", ["global", "sequential", "window(1)", "window(3)"])
@pytest.mark.parametrize("documents", ["packed", "masked"])
@pytest.mark.parametrize(("unique", "length"), [(None, 64), (3333, 64), (4999, 100), (640, 64)])
def test_num_valid_counts_what_read_delivers(
    make_pool: PoolMaker, order: str, documents: str, unique: int | None, length: int
) -> None:
    manifest, _ = make_pool()
    stream = make_stream(
        manifest, unique, length, order=order, documents=documents, epochs=2.6, seed=8
    )
    counts = stream.read(np.arange(stream.total_positions + 9)).valid.sum(axis=1)
    before = np.concatenate([[0], np.cumsum(counts)])
    edges = np.random.default_rng(1).integers(0, len(counts), (60, 2))
    for start, stop in [(0, len(counts)), *np.sort(edges, axis=1).tolist()]:
        assert stream.num_valid(start, stop) == before[stop] - before[start]


def test_fractional_epochs_visit_each_sequence_the_stated_number_of_times(
    make_pool: PoolMaker,
) -> None:
    stream = make_stream(make_pool()[0], 5000, 50, epochs=2.375)
    visits = np.bincount(stream.order.at(np.arange(stream.total_positions)), minlength=100)
    assert stream.total_positions == 238
    assert stream.epochs == 2.38
    assert visits.tolist().count(3) == 38
    assert visits.tolist().count(2) == 62
    assert stream.epoch_of(150) == 1.5


def test_smaller_budgets_are_prefixes_of_larger_ones(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    seen = []
    for unique in (1000, 2500, 5000):
        stream = make_stream(manifest, unique, 64)
        batch = stream.read(np.arange(stream.total_positions))
        ids = stream.order.at(np.arange(stream.total_positions))
        places = (ids[:, None] * 64 + np.arange(64))[batch.valid]
        seen.append(set(places.tolist()))
        assert len(seen[-1]) == unique
    assert seen[0] < seen[1] < seen[2]


@pytest.mark.parametrize("documents", ["packed", "masked"])
def test_positions_beyond_the_run_are_invalid_rows(make_pool: PoolMaker, documents: str) -> None:
    stream = make_stream(make_pool()[0], 1000, 64, documents=documents)
    total = stream.total_positions
    batch = stream.read(np.arange(total - 1, total + 3))
    assert not batch.valid[1:].any()
    assert (batch.tokens[1:] == PAD).all()
    assert (batch.segment[1:] == 0).all()
    assert batch.position.tolist() == [total - 1, total, total + 1, total + 2]
    assert not batch.all_valid


def test_flags_say_what_the_arrays_hold(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool(document=20)
    packed = make_stream(manifest, 4096, 64).read(np.arange(10))
    assert packed.all_valid
    assert packed.one_segment
    masked = make_stream(manifest, 4096, 64, documents="masked").read(np.arange(10))
    assert not masked.all_valid
    assert not masked.one_segment
    for row in range(10):
        part = make_stream(manifest, 4096, 64, documents="masked").read(np.array([row]))
        assert part.all_valid == part.valid.all()
        assert part.one_segment == (not part.segment.any())


def test_masked_segments_against_a_plain_loop(make_pool: PoolMaker) -> None:
    """A separator ends its segment unscored; the position after it opens the next one."""
    stream = make_stream(make_pool(document=9)[0], 4900, 64, documents="masked")
    batch = stream.read(np.arange(stream.total_positions))
    for row in range(len(batch.tokens)):
        segment = 0
        for place, token in enumerate(batch.tokens[row]):
            assert batch.segment[row, place] == segment
            if token == DOC:
                assert not batch.valid[row, place]
                segment += 1
    # the autoregressive shift puts the separator in front of the document that follows
    shifted = np.roll(batch.tokens, 1, axis=1)
    opens = np.diff(batch.segment, axis=1, prepend=0) > 0
    assert opens.any()
    assert (shifted[opens] == DOC).all()


def test_masked_and_packed_hold_the_same_tokens(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    packed = make_stream(manifest, 4000, 80).read(np.arange(50))
    masked = make_stream(manifest, 4000, 80, documents="masked").read(np.arange(50))
    assert np.array_equal(packed.tokens, masked.tokens)
    assert np.array_equal(packed.valid & (packed.tokens != DOC), masked.valid)


def test_budget_is_exact_and_refuses_more_than_the_pool() -> None:
    budget = Budget(1000, 64, 5000)
    assert (budget.unique_tokens, budget.sequences, budget.tail_tokens) == (1000, 16, 40)
    assert Budget(None, 64, 640).tail_tokens == 64
    with pytest.raises(BudgetError, match=r"5,001 .* pool of 5,000 .* at most 5000"):
        Budget(5001, 64, 5000)
    with pytest.raises(BudgetError, match="at least 1"):
        Budget(0, 64, 5000)


def test_unusable_stream_settings_are_refused(make_pool: PoolMaker) -> None:
    manifest, _ = make_pool()
    with pytest.raises(DataError, match="packed, masked"):
        make_stream(manifest, 1000, 64, documents="padded")
    for epochs in (0, -1, float("nan")):
        with pytest.raises(DataError, match="epochs"):
            make_stream(manifest, 1000, 64, epochs=epochs)
