"""The proof after a run: which positions it consumed, and how often each token was seen.

The run's log says which positions each step took; the stream says which sequence stands at each
position. Counting them, one by one, must give E visits for every sequence of the budget and none
for any other, and the tokens counted must be those that the run reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_pipeline.stream import TokenStream

_BLOCK = 1 << 16


@dataclass(frozen=True)
class VisitReport:
    """What a run saw."""

    positions: int
    """Sequences consumed."""
    epochs: float
    unique_tokens: int
    """Tokens of the budget that were seen at least once."""
    min_visits: int
    max_visits: int
    sequences_by_visits: dict[int, int]
    """How many sequences of the budget were visited how often."""
    tokens_scored: int
    """Valid target positions consumed."""
    problems: tuple[str, ...]
    """Gaps, repeats, sequences outside the budget, counts that disagree."""


def visit_report(stream: TokenStream, rows: Iterable[Mapping[str, float]]) -> VisitReport:
    """Count the visits of a run whose log `rows` carry `position_start` and `position_stop`."""
    problems: list[str] = []
    reached, tokens = 0, None
    for row in rows:
        if "position_stop" not in row:
            continue
        start, stop = int(row["position_start"]), int(row["position_stop"])
        if start != reached:
            kind = "are missing" if start > reached else "were consumed twice"
            low, high = sorted((start, reached))
            problems.append(f"positions {low:,} to {high:,} {kind} (step {int(row['step']):,})")
        reached, tokens = max(reached, stop), row.get("train/tokens", tokens)
    if reached > stream.total_positions:
        problems.append(
            f"the run went to position {reached:,}, beyond its end at {stream.total_positions:,}"
        )
    visits, strangers = count_visits(stream, reached)
    if strangers:
        problems.append(f"{strangers:,} positions held sequences outside the budget")
    whole = reached // stream.budget.sequences
    wrong = np.flatnonzero((visits < whole) | (visits > whole + 1))
    if len(wrong):
        problems.append(f"sequences {wrong[:5].tolist()} were not visited evenly")
    scored = stream.num_valid(0, reached)
    if tokens is not None and int(tokens) != scored:
        problems.append(f"the run reports {int(tokens):,} tokens, its positions hold {scored:,}")
    counts, numbers = np.unique(visits, return_counts=True)
    seen = visits > 0
    unique = int(seen.sum()) * stream.seq_length
    unique -= (stream.seq_length - stream.budget.tail_tokens) * bool(seen[-1])
    return VisitReport(
        positions=reached,
        epochs=reached / stream.budget.sequences,
        unique_tokens=unique,
        min_visits=int(visits.min()),
        max_visits=int(visits.max()),
        sequences_by_visits=dict(zip(counts.tolist(), numbers.tolist(), strict=True)),
        tokens_scored=scored,
        problems=tuple(problems),
    )


def count_visits(stream: TokenStream, stop: int) -> tuple[np.ndarray[Any, Any], int]:
    """Visits of each sequence of the budget, int64 [n], in positions [0, stop); and strangers."""
    n = stream.budget.sequences
    visits, strangers = np.zeros(n, np.int64), 0
    for start in range(0, stop, _BLOCK):
        ids = stream.order.at(np.arange(start, min(start + _BLOCK, stop)))
        inside = ids[(ids >= 0) & (ids < n)]
        strangers += len(ids) - len(inside)
        visits += np.bincount(inside, minlength=n)
    return visits, strangers
