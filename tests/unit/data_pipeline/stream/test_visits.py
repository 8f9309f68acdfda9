"""The visit proof accepts an honest log and names what is wrong with any other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.documents import DocumentMode
from data_pipeline.stream.mixture import MixtureMode, MixtureSource, MixtureStream
from data_pipeline.stream.stream import TokenStream
from data_pipeline.stream.visits import visit_report

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
Row = dict[str, float]


@pytest.fixture
def stream(make_pool: PoolMaker) -> TokenStream:
    pool = TokenPool(make_pool()[0])
    return TokenStream(pool, Budget(4321, 64, pool.num_tokens), seed=5, epochs=2.5)


def log_of(stream: TokenStream, step: int = 24) -> list[Row]:
    edges = [*range(0, stream.total_positions, step), stream.total_positions]
    return [
        {
            "step": float(i + 1),
            "position_start": float(a),
            "position_stop": float(b),
            "train/tokens": float(stream.num_valid(0, b)),
        }
        for i, (a, b) in enumerate(pairwise(edges))
    ]


def test_an_honest_log_proves_the_budget(stream: TokenStream) -> None:
    report = visit_report(stream, [{"step": 1, "validation/loss": 3.0}, *log_of(stream)])
    assert report.problems == ()
    (seen,) = report.sources
    assert seen.unique_tokens == 4321
    assert (seen.min_visits, seen.max_visits) == (2, 3)
    assert seen.sequences_by_visits == {2: 34, 3: 34}
    assert report.tokens_scored == stream.num_valid(0, 170)


def test_an_unfinished_first_epoch_counts_what_it_saw(stream: TokenStream) -> None:
    report = visit_report(stream, log_of(stream)[:1])
    assert report.problems == ()
    batch = stream.read(np.arange(24))
    (seen,) = report.sources
    assert seen.unique_tokens == batch.valid.sum()
    assert (seen.min_visits, seen.max_visits) == (0, 1)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda rows: rows.pop(2), "positions 48 to 72 are missing"),
        (lambda rows: rows.insert(3, rows[2]), "consumed twice"),
        (lambda rows: rows[-1].update({"train/tokens": 1.0}), "the run reports 1 tokens"),
        (lambda rows: rows[-1].update(position_stop=999.0), "beyond its end at 170"),
    ],
)
def test_a_log_that_does_not_add_up_is_named(
    stream: TokenStream, change: Callable[[list[Row]], None], problem: str
) -> None:
    rows = log_of(stream)
    change(rows)
    report = visit_report(stream, rows)
    assert any(problem in line for line in report.problems)


@pytest.mark.parametrize("mode", ["proportional", "weighted"])
@pytest.mark.parametrize("documents", ["packed", "masked"])
def test_every_source_of_a_mix_is_proved_by_itself(
    make_pool: PoolMaker, mode: MixtureMode, documents: DocumentMode
) -> None:
    """Visits counted from the log equal those counted from the tokens that were really read."""
    streams = []
    for seed, tokens in ((1, 1200), (2, 3000)):
        pool = TokenPool(make_pool(seed=seed, name=f"pool{seed}")[0])
        budget = Budget(tokens, 64, pool.num_tokens)
        streams.append(TokenStream(pool, budget, seed=seed, epochs=1, documents=documents))
    sources = [MixtureSource(n, s, weight=w) for n, s, w in zip("ab", streams, (3, 1), strict=True)]
    mix = MixtureStream(sources, mode, seed=9, epochs=2.5)
    report = visit_report(mix, log_of(mix))
    assert report.problems == ()
    assert [seen.name for seen in report.sources] == ["a", "b"]
    realised = {entry["name"]: entry["epochs"] for entry in mix.report()}
    for seen, part in zip(report.sources, streams, strict=True):
        assert seen.unique_tokens == part.budget.unique_tokens or mode == "weighted"
        assert seen.max_visits - seen.min_visits <= 1
        if mode == "weighted":
            assert seen.epochs == pytest.approx(realised[seen.name])
    rows = mix.read(np.arange(mix.total_positions)).tokens
    where, ids = mix.sequences_at(np.arange(mix.total_positions))
    for row in range(0, mix.total_positions, 7):
        part = streams[where[row]]
        start = int(ids[row]) * 64
        stop = min(start + 64, part.budget.unique_tokens)
        wanted = part.pool.tokens(start, stop)
        assert np.array_equal(rows[row][: stop - start], wanted)
