"""The same run in any layout: loss, gradient norm, evaluation and weights against one rank.

Loss and norm agree to 1e-5 relative in every step, with clipping active; each weight tensor ends
within 1e-3 of the distance it has moved (Adam amplifies the rounding of tiny gradients). Norms of
other runs may differ by up to 1e-4 where micro-batches differ, because gradients are then summed in
another order; these small ones stay within 1e-5 there too. Four steps show every mistake that is
known (test_traps.py); the slow suite takes twenty.
"""

from __future__ import annotations

import pytest
import torch
from layouts import LONG, STEPS, TASKS, WHOLE_TASKS, Layout, beside_one_rank, one_rank

from pretrain.training.compilation import missing_compiler

TWO_RANKS = [
    Layout(dp=2),
    Layout(tp=2, chunk=20),
    Layout(tp=2, sp=True),
    Layout(pp=2, zero=1, chunk=20),
    Layout(cp=2, zero=1),
]
FURTHER = [
    *(Layout(dp=2, zero=z) for z in (1, 2)),
    Layout(dp=2, zero=3, recompute="full", chunk=7),
    Layout(tp=2, zero=1),
    Layout(tp=2, sp=True, zero=1, recompute="selective"),
    Layout(cp=2, zero=0, recompute="full", chunk=7),
    Layout(cp=2, zero=3, recompute="selective"),
    *(Layout(dp=4, zero=z) for z in (1, 2)),
    *(Layout(tp=2, dp=2, zero=z, chunk=7) for z in (0, 1, 2, 3)),
    Layout(tp=2, dp=2, sp=True, zero=2),
    Layout(pp=2, tp=2, zero=1, recompute="selective"),
    Layout(pp=2, tp=2, sp=True, zero=1, recompute="full"),
    Layout(pp=2, dp=2, zero=1),
    Layout(pp=4, zero=1, recompute="full"),
    Layout(cp=2, dp=2, zero=2),
    Layout(cp=2, tp=2, zero=1),
    *(Layout(dp=2, zero=z, overlap=True) for z in (1, 2)),
    Layout(tp=2, dp=2, zero=2, overlap=True, chunk=7),
    Layout(cp=2, zero=3, overlap=False),
]
TWICE = [Layout(dp=4, zero=1), *(Layout(tp=2, dp=2, zero=z, chunk=7) for z in (0, 2))]
"""Layouts whose every part another one of FURTHER has too: in the slow suite only."""
WHOLE = [
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(tp=2),
    Layout(tp=2, sp=True, zero=1, recompute="selective"),
    pytest.param(Layout(tp=2, dp=2, zero=3, recompute="full"), marks=pytest.mark.slow),
]
"""Layouts of objectives that need the whole model on every rank."""
COMPILED = [
    Layout(dp=2, zero=2, compiled=True),
    Layout(tp=2, compiled=True),
    Layout(tp=2, sp=True, zero=1, recompute="selective", compiled=True),
    Layout(pp=2, zero=1, recompute="full", compiled=True, compiled_loss=True),
    Layout(dp=2, zero=3, chunk=7, compiled_loss=True),
    Layout(cp=2, zero=1, compiled_loss=True),
]
EIGHT_RANKS = [Layout(tp=2, pp=2, dp=2, zero=1), Layout(tp=2, dp=4, zero=2)]


def check(layout: Layout, task: str, steps: int = STEPS) -> None:
    """Compare a run in this layout with the reference."""
    results, want = beside_one_rank(layout, task, steps)
    rows = len(want["bound"]) // layout.dp
    for result in results:
        for step, (got, expected) in enumerate(zip(result["curve"], want["curve"], strict=True)):
            assert got == pytest.approx(expected, rel=1e-5), f"{task}, {layout}, step {step}"
        share = want["bound"][result["dp_rank"] * rows :][:rows]
        assert result["bound"] == pytest.approx(share, rel=1e-5), f"{task}, {layout}, evaluation"
        for name, expected in want["end"].items():
            assert torch.equal(result["start"][name], want["start"][name]), f"start of {name}"
            moved = (expected - want["start"][name]).norm()
            off = (result["end"][name] - expected).norm() / moved
            assert off <= 1e-3, f"{task}, {layout}: {name} is off by {off:.1e} of its way"


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
@pytest.mark.parametrize("layout", TWO_RANKS, ids=str)
def test_two_ranks_equal_one(layout, task, steps) -> None:
    check(layout, task, steps)


@pytest.mark.parametrize("steps", LENGTHS)
@pytest.mark.parametrize("task", WHOLE_TASKS)
@pytest.mark.parametrize("layout", WHOLE, ids=str)
def test_objectives_that_need_the_whole_model_equal_one_rank(layout, task, steps) -> None:
    check(layout, task, steps)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(layout, marks=[pytest.mark.slow] if layout in TWICE else [])
        for layout in FURTHER
    ],
    ids=str,
)
def test_every_other_layout_equals_one_rank(layout) -> None:
    """One objective each, in turn; the slow suite trains all of them."""
    check(layout, list(TASKS)[FURTHER.index(layout) % len(TASKS)])


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
@pytest.mark.parametrize("task", ["autoregressive", "uniform", "block"])
@pytest.mark.parametrize("layout", COMPILED, ids=str)
def test_compiled_layers_and_losses_train_as_one_rank_does_without(layout, task) -> None:
    check(layout, task, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("shift", range(len(TASKS)))
@pytest.mark.parametrize("layout", FURTHER, ids=str)
def test_every_other_layout_equals_one_rank_for_every_objective(layout, shift) -> None:
    task = list(TASKS)[(FURTHER.index(layout) + shift) % len(TASKS)]
    if layout.tp * layout.cp > TASKS[task].model.get("num_query_groups", 4):
        pytest.skip("two query groups cannot be layout four ways")
    check(layout, task, LONG)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("layout", EIGHT_RANKS, ids=str)
def test_eight_ranks_equal_one(layout, task) -> None:
    check(layout, task, LONG)
