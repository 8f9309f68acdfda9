"""The proof after a run: positions that it consumed, and visits of every sequence.

The run's log says which positions each step took; the stream says which sequence stands at each
position. Counting them, one by one, must give E visits for every sequence of the budget and none
for any other, and the tokens counted must be those that the run reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from data_pipeline.stream.order import IntArray
from data_pipeline.stream.stream import Stream, TokenStream

_BLOCK = 1 << 16


@dataclass(frozen=True)
class SourceVisits:
    """Visits of one pool by a run."""

    name: str
    """Name of the source in a mix; empty for a run on one pool."""
    epochs: float
    unique_tokens: int
    """Tokens of the budget that were seen at least once."""
    min_visits: int
    max_visits: int
    sequences_by_visits: dict[int, int]
    """Number of sequences of the budget for each number of visits."""


@dataclass(frozen=True)
class VisitReport:
    """Visits of all pools by a run, and the problems of its log."""

    positions: int
    """Sequences consumed."""
    epochs: float
    tokens_scored: int
    """Valid target positions consumed."""
    sources: tuple[SourceVisits, ...]
    """One for each pool."""
    problems: tuple[str, ...]
    """Gaps, repeats, sequences outside the budget, counts that disagree."""


def visit_report(stream: Stream, rows: Iterable[Mapping[str, float]]) -> VisitReport:
    """Count the visits of a run whose log `rows` hold `position_start` and `position_stop`."""
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
    visits, outside = count_visits(stream, reached)
    if outside:
        problems.append(f"{outside:,} positions held sequences outside the budget")
    sources = []
    for (name, part), counts in zip(stream.parts, visits, strict=True):
        sources.append(_summarise(name, part, counts))
        whole = int(counts.sum()) // len(counts)
        wrong = np.flatnonzero((counts < whole) | (counts > whole + 1))
        if len(wrong):
            of = f" of {name}" if name else ""
            problems.append(f"sequences {wrong[:5].tolist()}{of} were not visited evenly")
    scored = stream.num_valid(0, reached)
    if tokens is not None and int(tokens) != scored:
        problems.append(f"the run reports {int(tokens):,} tokens, its positions hold {scored:,}")
    return VisitReport(
        positions=reached,
        epochs=reached / stream.sequences_per_epoch,
        tokens_scored=scored,
        sources=tuple(sources),
        problems=tuple(problems),
    )


def count_visits(stream: Stream, stop: int) -> tuple[list[IntArray], int]:
    """Count the visits of each sequence in positions [0, stop), int64 [n] a part.

    The second value is the number of visits of sequences outside the budgets.
    """
    visits = [np.zeros(part.budget.sequences, np.int64) for _, part in stream.parts]
    outside = 0
    for start in range(0, stop, _BLOCK):
        where, ids = stream.sequences_at(np.arange(start, min(start + _BLOCK, stop)))
        for number, counts in enumerate(visits):
            drawn = ids[where == number]
            inside = drawn[(drawn >= 0) & (drawn < len(counts))]
            outside += len(drawn) - len(inside)
            counts += np.bincount(inside, minlength=len(counts))
    return visits, outside


def _summarise(name: str, part: TokenStream, counts: IntArray) -> SourceVisits:
    """Summary of the visits of one pool's sequences."""
    times, numbers = np.unique(counts, return_counts=True)
    seen = counts > 0
    unique = int(seen.sum()) * part.seq_length
    unique -= (part.seq_length - part.budget.tail_tokens) * bool(seen[-1])
    return SourceVisits(
        name=name,
        epochs=int(counts.sum()) / len(counts),
        unique_tokens=unique,
        min_visits=int(counts.min()),
        max_visits=int(counts.max()),
        sequences_by_visits=dict(zip(times.tolist(), numbers.tolist(), strict=True)),
    )
