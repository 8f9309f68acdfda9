"""The order as docs/data.md describes it is the order of the product.

`recount.py` was written from that text by somebody who had not seen the code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.mixture import MixtureMode, MixtureSource, MixtureStream
from data_pipeline.stream.stream import TokenStream

sys.path.insert(0, str(Path(__file__).parent))
import recount

PoolMaker = Callable[..., tuple[Path, np.ndarray]]
SEED, LENGTH = 2**63 - 1, 64


def stream_of(pool: TokenPool, tokens: int, order: str, epochs: float) -> TokenStream:
    budget = Budget(tokens, LENGTH, pool.num_tokens)
    return TokenStream(pool, budget, seed=SEED, order=order, epochs=epochs)


@pytest.mark.parametrize("order", ["global", "sequential", "window(2)", "window(99)"])
@pytest.mark.parametrize(("tokens", "epochs"), [(4321, 2.5), (64, 3), (65, 0.01)])
def test_one_pool(make_pool: PoolMaker, order: str, tokens: int, epochs: float) -> None:
    manifest, _ = make_pool()
    pool = TokenPool(manifest)
    stream = stream_of(pool, tokens, order, epochs)
    told = recount.sequences(
        [(tokens, pool.manifest.shard_tokens)],
        seed=SEED,
        seq_length=LENGTH,
        epochs=epochs,
        order=order,
    )
    source, sequence = stream.sequences_at(np.arange(stream.total_positions))
    assert told == list(zip(source.tolist(), sequence.tolist(), strict=True))
    for position in {0, len(told) - 1, np.argmax(sequence)}:
        batch = stream.read(np.array([position]))
        read = recount.tokens(manifest, told[position][1], LENGTH, tokens)
        assert batch.tokens[batch.valid].tolist() == read


@pytest.mark.parametrize(
    ("mode", "weights", "order"),
    [
        ("proportional", None, "global"),
        ("weighted", [1.0, 1.0, 10.0], "global"),
        ("weighted", [0.1, 0.3, 1.0], "window(2)"),
    ],
)
def test_a_mixture(
    make_pool: PoolMaker, mode: MixtureMode, weights: list[float] | None, order: str
) -> None:
    pool = TokenPool(make_pool()[0])
    budgets = [4321, 700, 64]
    sources = [
        MixtureSource(str(i), stream_of(pool, tokens, order, 1), weight=weight)
        for i, (tokens, weight) in enumerate(zip(budgets, weights or [1.0] * 3, strict=True))
    ]
    stream = MixtureStream(sources, mode, seed=SEED, epochs=40.5)
    told = recount.sequences(
        [(tokens, pool.manifest.shard_tokens) for tokens in budgets],
        seed=SEED,
        seq_length=LENGTH,
        epochs=40.5,
        order=order,
        mode=mode,
        weights=weights,
    )
    source, sequence = stream.sequences_at(np.arange(stream.total_positions))
    assert told == list(zip(source.tolist(), sequence.tolist(), strict=True))
    visits = recount.visits([(0, 1000), (1000, len(told))], told)
    assert sum(visits.values()) == stream.total_positions
