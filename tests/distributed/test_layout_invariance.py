"""The same run in any layout: loss, gradient norm, evaluation and weights against one rank.

Loss and norm agree to 1e-5 relative in every step, with clipping active; each weight tensor ends
within 1e-3 of the distance it has moved (Adam amplifies the rounding of tiny gradients). Norms of
other runs may differ by up to 1e-4 where micro-batches differ, because gradients are then summed in
another order; these small ones stay within 1e-5 there too. Six steps show every mistake that is
known (test_traps.py); the slow suite takes twenty.
"""

from __future__ import annotations

import pytest
import torch
from layouts import LONG, STEPS, TASKS, WHOLE_TASKS, Cut, beside_one_rank, one_rank

from pretrain.training.compilation import missing_compiler

TWO_RANKS = [
    Cut(dp=2),
    Cut(tp=2, chunk=20),
    Cut(tp=2, sp=True),
    Cut(pp=2, zero=1, chunk=20),
    Cut(cp=2, zero=1),
]
FURTHER = [
    *(Cut(dp=2, zero=z) for z in (1, 2)),
    Cut(dp=2, zero=3, recompute="full", chunk=7),
    Cut(tp=2, zero=1),
    Cut(tp=2, sp=True, zero=1, recompute="selective"),
    Cut(cp=2, zero=0, recompute="full", chunk=7),
    Cut(cp=2, zero=3, recompute="selective"),
    *(Cut(dp=4, zero=z) for z in (1, 2)),
    *(Cut(tp=2, dp=2, zero=z, chunk=7) for z in (0, 1, 2, 3)),
    Cut(tp=2, dp=2, sp=True, zero=2),
    Cut(pp=2, tp=2, zero=1, recompute="selective"),
    Cut(pp=2, tp=2, sp=True, zero=1, recompute="full"),
    Cut(pp=2, dp=2, zero=1),
    Cut(pp=4, zero=1, recompute="full"),
    Cut(cp=2, dp=2, zero=2),
    Cut(cp=2, tp=2, zero=1),
    *(Cut(dp=2, zero=z, overlap=True) for z in (1, 2)),
    Cut(tp=2, dp=2, zero=2, overlap=True, chunk=7),
    Cut(cp=2, zero=3, overlap=False),
]
WHOLE = [
    Cut(dp=2, zero=2),
    Cut(dp=2, zero=3),
    Cut(tp=2),
    Cut(tp=2, sp=True, zero=1, recompute="selective"),
    pytest.param(Cut(tp=2, dp=2, zero=3, recompute="full"), marks=pytest.mark.slow),
]
"""Layouts of objectives that need the whole model on every rank."""
COMPILED = [
    Cut(dp=2, zero=2, compiled=True),
    Cut(tp=2, compiled=True),
    Cut(tp=2, sp=True, zero=1, recompute="selective", compiled=True),
    Cut(pp=2, zero=1, recompute="full", compiled=True, compiled_loss=True),
    Cut(dp=2, zero=3, chunk=7, compiled_loss=True),
    Cut(cp=2, zero=1, compiled_loss=True),
]
EIGHT_RANKS = [Cut(tp=2, pp=2, dp=2, zero=1), Cut(tp=2, dp=4, zero=2)]


def check(cut: Cut, task: str, steps: int = STEPS) -> None:
    """Compare a run in this layout with the reference."""
    results, want = beside_one_rank(cut, task, steps)
    rows = len(want["bound"]) // cut.dp
    for result in results:
        for step, (got, expected) in enumerate(zip(result["curve"], want["curve"], strict=True)):
            assert got == pytest.approx(expected, rel=1e-5), f"{task}, {cut}, step {step}"
        share = want["bound"][result["dp_rank"] * rows :][:rows]
        assert result["bound"] == pytest.approx(share, rel=1e-5), f"{task}, {cut}, evaluation"
        for name, expected in want["end"].items():
            assert torch.equal(result["start"][name], want["start"][name]), f"start of {name}"
            moved = (expected - want["start"][name]).norm()
            off = (result["end"][name] - expected).norm() / moved
            assert off <= 1e-3, f"{task}, {cut}: {name} is off by {off:.1e} of its way"


@pytest.mark.parametrize("task", [*TASKS, *WHOLE_TASKS])
def test_clipping_is_active_in_every_step_of_the_reference(task) -> None:
    assert min(norm for _, norm in one_rank(task)["curve"]) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_the_reference_learns(task) -> None:
    curve = one_rank(task, LONG)["curve"]
    assert curve[-1][0] < curve[0][0]


LENGTHS = [STEPS, pytest.param(LONG, marks=pytest.mark.slow)]


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cut", TWO_RANKS, ids=str)
def test_two_ranks_equal_one(cut, task, steps) -> None:
    check(cut, task, steps)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("task", WHOLE_TASKS)
@pytest.mark.parametrize("cut", WHOLE, ids=str)
def test_objectives_that_need_the_whole_model_equal_one_rank(cut, task, steps) -> None:
    check(cut, task, steps)


@pytest.mark.parametrize("cut", FURTHER, ids=str)
def test_every_other_layout_equals_one_rank(cut) -> None:
    """One objective each, in turn; the slow suite trains all of them."""
    check(cut, list(TASKS)[FURTHER.index(cut) % len(TASKS)])


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("task", ["autoregressive", "uniform", "block"])
@pytest.mark.parametrize("cut", COMPILED, ids=str)
def test_compiled_layers_and_losses_train_as_one_rank_does_without(cut, task) -> None:
    check(cut, task, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(len(TASKS)))
@pytest.mark.parametrize("cut", FURTHER, ids=str)
def test_every_other_layout_equals_one_rank_for_every_objective(cut, shift) -> None:
    task = list(TASKS)[(FURTHER.index(cut) + shift) % len(TASKS)]
    if cut.tp * cut.cp > TASKS[task].model.get("num_query_groups", 4):
        pytest.skip("two query groups cannot be cut four ways")
    check(cut, task, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("cut", EIGHT_RANKS, ids=str)
def test_eight_ranks_equal_one(cut, task) -> None:
    check(cut, task, LONG)
