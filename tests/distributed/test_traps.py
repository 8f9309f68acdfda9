"""Known traps of parallel training, each with its fix taken away: the layout tests must notice.

What these traps have in common is that nothing fails: replicas drift apart, or a norm is wrong, and
the curve is only a little off. The others of their kind are refused before launch (bfloat16 or a
pipeline with ZeRO stage 0: `tests/unit/parallel/layout/test_topology.py`).
"""

from __future__ import annotations

from typing import Any

import pytest
from harness import run_ranks
from layouts import STEPS, TASKS, Layout, Trainer, as_dict, one_rank, shallow

Curve = list[tuple[float, float]]


def train_with_and_without(fix: str, layout: dict[str, Any], task: str) -> list[Curve]:
    """Loss and gradient norm of each step of two short runs; the second one lacks a repair."""
    from pretrain.model import conditioning, layers

    chosen = shallow(TASKS[task])
    intact = Trainer(Layout(**layout), chosen).train(0, STEPS)
    if fix == "sum of the norms' partial gradients":
        layers.sum_gradient = lambda weight, topology: weight
    if fix == "sum of the modulations' partial gradients":
        conditioning.sum_gradient = lambda vectors, topology: vectors
    trainer = Trainer(Layout(**layout), chosen)
    if fix == "marks of sliced parameters":
        for parameter in trainer.engine.parameters.values():
            parameter.tensor_model_parallel = False
    return [intact, trainer.train(0, STEPS)]


def distance(curve: Curve, reference: Curve) -> float:
    """The largest relative difference in any loss or norm."""
    pairs = zip(curve, reference, strict=True)
    return max(abs(got / want - 1) for a, b in pairs for got, want in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("fix", "layout", "task"),
    [
        # Each rank sees its own heads only, so gradients of QK-norm weights are partial.
        ("sum of the norms' partial gradients", Layout(tp=2), "autoregressive"),
        # With sequence parallelism the weights of every norm and modulation see a slice.
        ("sum of the norms' partial gradients", Layout(tp=2, sp=True), "masked"),
        ("sum of the modulations' partial gradients", Layout(tp=2, sp=True), "uniform"),
        # Norms count a sliced weight once a rank and a replicated one once, by its mark.
        ("marks of sliced parameters", Layout(tp=2), "masked"),
        ("marks of sliced parameters", Layout(tp=2, dp=2, zero=1), "autoregressive"),
    ],
    ids=str,
)
def test_without_its_fix_a_trap_is_noticed(fix: str, layout: Layout, task: str) -> None:
    """The same comparison passes with the fix and misses by twenty times its tolerance
    without."""
    want = one_rank(task)["curve"]
    for intact, broken in run_ranks(
        layout.ranks, train_with_and_without, fix, as_dict(layout), task
    ):
        assert distance(intact, want) < 1e-5
        assert distance(broken, want) > 2e-4
