"""The planner against real engines: weights and optimizer to the byte, activations closely."""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_ranks
from layouts import TASKS, Cut, as_dict
from planned import held_and_planned
from test_layout_invariance import FURTHER, TWO_RANKS

CUTS = [
    Cut(),
    Cut(zero=3),
    *(Cut(zero=z, precision="bfloat16") for z in (1, 2, 3)),
    *TWO_RANKS,
    *FURTHER,
    *(Cut(dp=2, zero=z, precision="bfloat16") for z in (1, 2, 3)),
    Cut(dp=4, zero=3, precision="bfloat16"),
    Cut(tp=2, sp=True, zero=1, precision="bfloat16"),
    Cut(tp=2, dp=2, zero=3, precision="bfloat16"),
    Cut(pp=2, tp=2, zero=1, precision="bfloat16"),
    Cut(pp=2, dp=2, zero=1, precision="bfloat16"),
    Cut(cp=2, dp=2, zero=2, precision="bfloat16"),
]


def check_held(cut: Cut, task: str) -> None:
    ranks: list[dict[str, Any]] = run_ranks(cut.ranks, held_and_planned, as_dict(cut), task)
    for rank, held in enumerate(ranks):
        for what, (real, planned) in held.items():
            assert real == planned, f"{cut}, {task}: {what} of rank {rank}"


@pytest.mark.parametrize("cut", CUTS, ids=lambda cut: f"{cut}-{cut.precision}")
def test_parameters_and_optimizer_equal_those_of_an_engine_to_the_byte(cut: Cut) -> None:
    check_held(cut, list(TASKS)[CUTS.index(cut) % len(TASKS)])
