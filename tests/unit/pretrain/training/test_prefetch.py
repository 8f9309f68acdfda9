"""Prefetched batches: the same as those made in turn, for every objective, and errors in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import DataError
from data_pipeline.shards.pool import TokenPool
from data_pipeline.stream.budget import Budget
from data_pipeline.stream.loader import BudgetLoader, GlobalBatch
from data_pipeline.stream.stream import TokenBatch, TokenStream
from data_pipeline.tokenizer import load_tokenizer
from pretrain.batch import AttentionRule, TrainBatch
from pretrain.config.objectives import objectives
from pretrain.config.run import ModelConfig
from pretrain.data import clean_batch, token_space
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.training.prefetch import PrefetchedBatches

LENGTH, BATCH, MICRO, SEQUENCES = 24, 4, 2, 10
OBJECTIVES: dict[str, dict[str, Any]] = {
    "autoregressive": {},
    "orders": {"name": "autoregressive", "orders": 3, "hide": "queries"},
    "masked": {},
    "uniform": {"curriculum_sequences": 6, "curriculum_temperature": (0.3, 0.05)},
    "interpolating": {},
    "block": {"block_size": 4, "adapt_clip": True},
    "esoteric": {"alpha0": 0.5},
    "gaussian": {"reconstruction_share": 0.25},
    "distillation": {"round_sequences": 5, "first_gap": 0.1},
}


def objective(name: str, pool: Path) -> Objective:
    """A fresh objective over the tokens of the pool."""
    space = token_space(load_tokenizer(pool / "tokenizer.model"), ModelConfig())
    return build_objective(
        objectives.make(**{"name": name, "time_window": 4, **OBJECTIVES[name]}), space
    )


def steps(name: str, pool: Path, prefetched: int, adapt: bool = True) -> Iterator[list[TrainBatch]]:
    """Micro-batches of each step of a short run, `prefetched` of them during the step before.

    As in training the objective's state changes between steps: an adapting one after step 1, and a
    round of distillation begins when a step's batches are there.
    """
    family = objective(name, pool)
    budget = Budget(SEQUENCES * LENGTH - 5, LENGTH, 10**6)
    stream = TokenStream(TokenPool(pool / "train" / "manifest.json"), budget, seed=0, epochs=1)
    loader = BudgetLoader(
        stream, global_batch_size=BATCH, micro_batch_size=MICRO, dp_rank=0, dp_size=1, prefetch=0
    )

    def make(tokens: TokenBatch) -> TrainBatch:
        clean = clean_batch(tokens)
        return family.corrupt(clean, NoiseKey(0, clean.position))

    batches = PrefetchedBatches(loader, make, lambda: family.state)
    for number, batch in enumerate(batches):
        if family.teacher:
            family.begins_round(batch.start)
        yield batch.micro_batches
        for _ in range(prefetched):
            batches.prefetch()
        if adapt and family.adapts and number == 1:
            family.restore({"interval": [0.7, 0.9]})


def same(a: Any, b: Any) -> bool:
    """Whether two values of a batch are bitwise equal, through dictionaries and rules."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, AttentionRule):
        return a.kind == b.kind and same(a.columns, b.columns) and same(a.documents, b.documents)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if hasattr(a, "__dict__"):
        return same(vars(a), vars(b))
    return a == b


@pytest.mark.parametrize("name", OBJECTIVES)
def test_prefetched_batches_are_those_made_in_turn(name: str, pool: Path) -> None:
    """Made not at all, in part, to the end, and asked for more often than there are any."""
    want = list(steps(name, pool, 0))
    assert [len(step) for step in want] == [2, 2, 2]
    for prefetched in (1, 2, 5):
        got = list(steps(name, pool, prefetched))
        assert len(got) == len(want)
        assert all(
            same(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)
        )


def test_an_objective_that_adapts_has_other_batches_afterwards(pool: Path) -> None:
    """Else the case above would prove nothing about it."""
    changed, same_interval = (list(steps("block", pool, 2, adapt)) for adapt in (True, False))
    equal = [same(a[0].ids, b[0].ids) for a, b in zip(changed, same_interval, strict=True)]
    assert equal == [True, True, False]


def batch(start: int) -> GlobalBatch:
    """A step of two micro-batches that are their own numbers."""
    return GlobalBatch(start, start + 2, 2, [start, start + 1])


def test_each_call_makes_one_batch_of_the_next_step_and_none_of_the_one_after() -> None:
    made: list[Any] = []
    batches = PrefetchedBatches(
        [batch(0), batch(2), batch(4)], lambda n: made.append(n) or n, lambda: None
    )
    for step in batches:
        assert made == list(range(step.stop)), "what is trained on is complete, and no more is made"
        batches.prefetch()
        assert made == list(range(min(step.stop + 1, 6)))
        batches.prefetch()
        batches.prefetch()
        assert made == list(range(min(step.stop + 2, 6)))
    assert made == list(range(6))


def test_batches_are_made_anew_only_where_the_state_has_changed() -> None:
    made: list[Any] = []
    state = {"round": 0}
    batches = PrefetchedBatches(
        [batch(0), batch(2)], lambda n: made.append(n) or n, lambda: dict(state)
    )
    steps = iter(batches)
    next(steps)
    batches.prefetch()
    batches.prefetch()
    state["round"] = 1
    assert next(steps).micro_batches == [2, 3]
    assert made == [0, 1, 2, 3, 2, 3]


@pytest.mark.parametrize("where", ["reading", "making"])
def test_an_error_of_the_next_step_waits_for_its_turn(where: str) -> None:
    def clean() -> Iterator[GlobalBatch]:
        yield batch(0)
        if where == "reading":
            raise DataError("bad shard")
        yield batch(2)

    def make(number: Any) -> Any:
        if number == 3:
            raise DataError("bad shard")
        return number

    batches = PrefetchedBatches(clean(), make, lambda: None)
    steps = iter(batches)
    assert next(steps).micro_batches == [0, 1]
    batches.prefetch()
    batches.prefetch()
    batches.prefetch()
    with pytest.raises(DataError, match="bad shard"):
        next(steps)
