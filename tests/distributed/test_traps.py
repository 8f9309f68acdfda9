"""Known traps of parallel training, each with its fix taken away: the layout tests must notice.

What these traps have in common is that nothing fails: replicas drift apart, or a norm is wrong, and
the curve is only a little off. The others of their kind are refused before launch (bfloat16 or a
pipeline with ZeRO stage 0: `tests/unit/parallel/test_topology.py`).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from harness import run_ranks
from layouts import TASKS, Cut, Trainer, as_dict

STEPS = 6


def train_without(fix: str, cut: dict[str, Any], task: str) -> dict[str, Any]:
    """A short run in which one repair is missing; "" takes nothing away."""
    from pretrain.model import conditioning, layers

    if fix == "sum of the norms' partial gradients":
        layers.sum_gradient = lambda weight: weight
    if fix == "sum of the modulations' partial gradients":
        conditioning.sum_gradient = lambda vectors: vectors
    trainer = Trainer(Cut(**cut), TASKS[task])
    if fix == "marks of sliced parameters":
        for parameter in trainer.engine.parameters.values():
            parameter.tensor_model_parallel = False
    curve = trainer.train(0, STEPS)
    return {"curve": curve}


@cache
def intact(task: str) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step on one rank."""
    return run_ranks(1, train_without, "", as_dict(Cut()), task)[0]["curve"]


@pytest.mark.parametrize(
    ("fix", "cut", "task"),
    [
        # Each rank sees its own heads only, so gradients of QK-norm weights are partial.
        ("sum of the norms' partial gradients", Cut(tp=2), "autoregressive"),
        # With sequence parallelism the weights of every norm and modulation see a slice.
        ("sum of the norms' partial gradients", Cut(tp=2, sp=True), "masked"),
        ("sum of the modulations' partial gradients", Cut(tp=2, sp=True), "uniform"),
        # Norms count a sliced weight once a rank and a replicated one once, by its mark.
        ("marks of sliced parameters", Cut(tp=2), "masked"),
        ("marks of sliced parameters", Cut(tp=2, dp=2, zero=1), "autoregressive"),
    ],
    ids=str,
)
def test_without_its_fix_a_trap_is_noticed(fix: str, cut: Cut, task: str) -> None:
    """The same comparison passes with the fix and misses by twenty times its tolerance
    without."""
    want = intact(task)
    for taken, holds in (("", True), (fix, False)):
        for rank in run_ranks(cut.ranks, train_without, taken, as_dict(cut), task):
            pairs = zip(rank["curve"], want, strict=True)
            off = max(abs(got / ref - 1) for a, b in pairs for got, ref in zip(a, b, strict=True))
            assert (off < 1e-5) if holds else (off > 2e-4), (taken, off)
