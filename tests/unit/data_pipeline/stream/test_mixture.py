"""Mixtures: every source consumed without gap or repeat, at its rate, from the position alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BudgetError, CursorError, DataError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.cursor import Cursor
from data_pipeline.stream.loader import BudgetLoader
from data_pipeline.stream.mixture import BLOCK, MixtureSource, MixtureStream, quantise
from data_pipeline.stream.stream import TokenStream

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
BUDGETS = (4321, 2500, 640)


@pytest.fixture
def make_mixture(make_pool: PoolMaker) -> Callable[..., MixtureStream]:
    def make(mode: str, epochs: float = 12, **options: Any) -> MixtureStream:
        weights = options.pop("weights", (5, 3, 1))
        caps = options.pop("caps", (None, None, None))
        sources = []
        for number, unique in enumerate(BUDGETS):
            path = make_pool(seed=number, name=f"pool{number}")[0]
            pool = TokenPool(path)
            stream = TokenStream(
                pool,
                Budget(unique, 64, pool.num_tokens),
                seed=number,
                epochs=1,
                documents=options.get("documents", "packed"),
            )
            sources.append(MixtureSource(f"s{number}", stream, weights[number], caps[number]))
        return MixtureStream(sources, mode, seed=options.get("seed", 9), epochs=epochs)  # type: ignore[arg-type]

    return make


def visits_of(mixture: MixtureStream) -> list[np.ndarray]:
    """Number of times each token of each source is scored, by matching rows with the sources'."""
    batch = mixture.read(np.arange(mixture.total_positions))
    known: dict[bytes, tuple[int, int]] = {}
    counts = [np.zeros(unique, np.int64) for unique in BUDGETS]
    for number, entry in enumerate(mixture.sources):
        n = entry.stream.budget.sequences
        pool = entry.stream.pool
        entry_rows = pool.rows(pool.locate(np.arange(n), 64), 0, n)
        for sequence in range(n):
            length = min(64, BUDGETS[number] - sequence * 64)
            known[entry_rows[sequence, :length].astype(np.int64).tobytes()] = (number, sequence)
    for tokens, valid in zip(batch.tokens, batch.valid, strict=True):
        number, sequence = known[tokens[valid].tobytes()]
        counts[number][sequence * 64 : sequence * 64 + int(valid.sum())] += 1
    return counts


def test_proportional_scores_every_token_of_all_budgets_e_times(
    make_mixture: Callable[..., MixtureStream],
) -> None:
    mixture = make_mixture("proportional", epochs=3)
    assert all((counts == 3).all() for counts in visits_of(mixture))
    assert mixture.num_valid(0, mixture.total_positions) == 3 * sum(BUDGETS)
    assert [round(r["epochs"], 9) for r in mixture.report()] == [3, 3, 3]


def test_weighted_sources_repeat_evenly_at_their_own_rate(
    make_mixture: Callable[..., MixtureStream],
) -> None:
    mixture = make_mixture("weighted")
    for counts, report in zip(visits_of(mixture), mixture.report(), strict=True):
        assert {int(np.floor(report["epochs"])), int(np.ceil(report["epochs"]))} >= set(
            counts.tolist()
        )
    shares = [report["share"] for report in mixture.report()]
    assert sum(shares) == pytest.approx(1)
    assert np.abs(np.array(shares) - np.array([5, 3, 1]) / 9).max() < 0.02


def test_every_block_holds_the_quantised_share_exactly(
    make_mixture: Callable[..., MixtureStream],
) -> None:
    mixture = make_mixture("weighted", epochs=40)
    draws = quantise((5, 3, 1), ("a", "b", "c"))
    assert draws.sum() == BLOCK
    for block in range(mixture.total_positions // BLOCK):
        step = mixture.consumed((block + 1) * BLOCK) - mixture.consumed(block * BLOCK)
        assert np.array_equal(step, draws)


@pytest.mark.parametrize("mode", ["proportional", "weighted"])
@pytest.mark.parametrize("documents", ["packed", "masked"])
def test_reading_is_a_function_of_the_position_and_counts_agree(
    make_mixture: Callable[..., MixtureStream], mode: str, documents: str
) -> None:
    mixture = make_mixture(mode, documents=documents)
    total = mixture.total_positions
    whole = mixture.read(np.arange(total + 5))
    assert not whole.valid[total:].any()
    some = np.random.default_rng(0).permutation(total + 5)[:200]
    part = mixture.read(some)
    for field in ("tokens", "valid", "segment", "position"):
        assert np.array_equal(getattr(part, field), getattr(whole, field)[some])
    before = np.concatenate([[0], np.cumsum(whole.valid.sum(axis=1))])
    for start, stop in ((0, total), (0, total + 5), (3, 700), (1020, 1030), (1024, 2048)):
        stop = min(stop, total + 5)
        assert mixture.num_valid(start, stop) == before[stop] - before[start]


@pytest.mark.parametrize("mode", ["proportional", "weighted"])
def test_ranks_do_not_change_a_mixture_and_it_resumes_anywhere(
    make_mixture: Callable[..., MixtureStream], mode: str
) -> None:
    mixture = make_mixture(mode)
    expected = mixture.read(np.arange(240)).tokens
    parts = []
    for start, ranks in ((0, 1), (96, 3)):
        loaders = [
            BudgetLoader(
                mixture,
                global_batch_size=24,
                micro_batch_size=4,
                dp_rank=r,
                dp_size=ranks,
                start_position=start,
            )
            for r in range(ranks)
        ]
        for step in list(zip(*loaders, strict=True))[: (96 if start == 0 else 144) // 24]:
            parts += [m.tokens for batch in step for m in batch.micro_batches]
    assert np.array_equal(np.concatenate(parts), expected)


def test_cursor_of_a_mixture_refuses_other_weights(
    make_mixture: Callable[..., MixtureStream],
) -> None:
    cursor = Cursor.at(make_mixture("weighted"), 100)
    cursor.check(make_mixture("weighted", epochs=30))
    with pytest.raises(CursorError, match="manifest: saved"):
        cursor.check(make_mixture("weighted", weights=(5, 3, 2)))
    with pytest.raises(CursorError, match="order: saved weighted, now proportional"):
        cursor.check(make_mixture("proportional"))


def test_repeat_caps_and_unusable_weights_are_refused(
    make_mixture: Callable[..., MixtureStream],
) -> None:
    with pytest.raises(BudgetError, match=r"s2 would be repeated .* max_epochs is 4"):
        make_mixture("weighted", caps=(None, None, 4))
    with pytest.raises(DataError, match="weights of s2 are below 1/1024"):
        make_mixture("weighted", weights=(10_000, 1000, 1))
    with pytest.raises(DataError, match="positive"):
        make_mixture("weighted", weights=(1, -1, 1))
    with pytest.raises(DataError, match="proportional, weighted"):
        make_mixture("alternating")
