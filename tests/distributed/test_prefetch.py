"""Runs whose batches are prefetched by one step, against runs that make each in its turn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from harness import run_ranks

STEPS, MICRO = 15, 2  # micro-batches of a step


def train(pool: Path, run: Path, *more: str, prefetch: bool) -> tuple[int, list[int]]:
    """The exit code, and how many micro-batches had been made when each step had ended."""
    from pretrain import train
    from pretrain.training import hooks, session
    from pretrain.training.prefetch import PrefetchedBatches

    made, by_step = [], []
    make, after = session.Session.training_batch, hooks.Hooks.after_step

    def counted(self: Any, tokens: Any) -> Any:
        made.append(tokens)
        return make(self, tokens)

    def after_step(self: Any, *arguments: Any) -> None:
        by_step.append(len(made))
        after(self, *arguments)

    session.Session.training_batch, hooks.Hooks.after_step = counted, after_step
    if not prefetch:
        PrefetchedBatches.prefetch = lambda self: None
    return train.main(runs.overrides(pool, run, *more)), by_step


CASES = [
    (1, [*runs.ADAPTING, "parallel.zero_stage=0"]),
    (2, ["objective=masked", "parallel.zero_stage=2"]),
]


@pytest.mark.parametrize(("ranks", "more"), CASES, ids=["block-adapts", "masked-zero2"])
def test_a_run_is_bitwise_that_without_prefetch(
    pool: Path, tmp_path: Path, ranks: int, more: list[str]
) -> None:
    more = [*more, f"train.micro_batch_size={8 // ranks // MICRO}"]
    made = {}
    for prefetch in (True, False):
        ended = run_ranks(ranks, train, pool, tmp_path / str(prefetch), *more, prefetch=prefetch)
        assert [code for code, _ in ended] == [0] * ranks
        made[prefetch] = ended[0][1]
    assert made[False] == [MICRO * (k + 1) for k in range(STEPS)]
    # One step more has been made when a step ends; where the objective has adapted after it, in
    # vain, so that it is made twice.
    twice = MICRO if "objective=block" in more else 0
    epoch = 6  # the evaluation on the way comes after this step
    want = [MICRO * (k + 2) + (twice if k >= epoch else 0) for k in range(STEPS)]
    assert made[True] == [*want[:-1], want[-2]]
    ours, theirs = (runs.log(tmp_path / name) for name in ("True", "False"))
    assert ours == theirs
    end, other = (runs.checkpoint(tmp_path / name, STEPS) for name in ("True", "False"))
    assert end.pop("state") == other.pop("state")
    assert all(torch.equal(tensor, other[name]) for name, tensor in end.items())
