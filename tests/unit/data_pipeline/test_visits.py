"""The visit proof accepts an honest log and names what is wrong with any other."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.budget import Budget
from data_pipeline.pool import TokenPool
from data_pipeline.stream import TokenStream
from data_pipeline.visits import visit_report

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
    assert report.unique_tokens == 4321
    assert (report.min_visits, report.max_visits) == (2, 3)
    assert report.sequences_by_visits == {2: 34, 3: 34}
    assert report.tokens_scored == stream.num_valid(0, 170)


def test_an_unfinished_first_epoch_counts_what_it_saw(stream: TokenStream) -> None:
    report = visit_report(stream, log_of(stream)[:1])
    assert report.problems == ()
    batch = stream.read(np.arange(24))
    assert report.unique_tokens == batch.valid.sum()
    assert (report.min_visits, report.max_visits) == (0, 1)


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
