"""Checkpoints of the real model across layouts: pipeline, tensor, sequence, data parallel, ZeRO.

Whatever layout writes, every other one restores bit for bit (weights, moments, cursor) and goes on
along the same curve to 1e-5; the same layout goes on bitwise.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import same
from harness import run_ranks
from layouts import TASKS, Layout, Trainer, as_dict, shallow

SAVED, END = 2, 4

LAYOUTS = [
    Layout(),
    Layout(dp=2, zero=1),
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(tp=2),
    Layout(tp=2, sp=True, zero=1),
    Layout(pp=2, zero=1),
    Layout(pp=2, tp=2, zero=1),
    Layout(pp=2, dp=2, zero=1),
    Layout(pp=4, zero=1),
    Layout(tp=2, dp=2, zero=2),
    Layout(tp=2, dp=2, zero=3),
    Layout(cp=2, zero=1),
]


def contents(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights and moments."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    return {f"{k}/{n}": trainer.engine.read(n, k).clone() for n in trainer.names() for k in kinds}


def is_deep(*layouts: Layout) -> bool:
    """Whether a layout among these has stages, which are of unequal lengths with enough layers."""
    return any(layout.pp > 1 for layout in layouts)


def save(layout: dict[str, Any], task: str, deep: bool, folder: Path) -> dict[str, Any]:
    """Train, save in the middle, train on."""
    from parallel.checkpoint import save_checkpoint

    trainer = Trainer(Layout(**layout), TASKS[task] if deep else shallow(TASKS[task]))
    trainer.train(0, SAVED)
    state = {"position": SAVED * 8}
    save_checkpoint(trainer.engine, folder, SAVED, state)
    held = contents(trainer)
    curve = trainer.train(SAVED, END)
    return {"held": held, "curve": curve, "end": contents(trainer)}


def resume(
    layout: dict[str, Any], task: str, deep: bool, folder: Path, to_the_end: bool
) -> dict[str, Any]:
    """Restore into a fresh engine and train on; with `to_the_end` also all tensors afterwards."""
    from parallel.checkpoint import load_latest

    trainer = Trainer(Layout(**layout), TASKS[task] if deep else shallow(TASKS[task]))
    _, state = load_latest(trainer.engine, folder)
    held = contents(trainer)
    curve = trainer.train(SAVED, END)
    end = contents(trainer) if to_the_end else {}
    return {"state": state, "held": held, "curve": curve, "end": end}


def check(source: Layout, targets: list[Layout], folder: Path) -> None:
    """Save under `source` and resume under each of `targets`."""
    task = "uniform" if source in LAYOUTS[::2] else "masked"
    deep = is_deep(source, *targets)
    saved = run_ranks(source.ranks, save, as_dict(source), task, deep, folder, timeout=300)[0]
    for target in targets:
        name = f"{source} -> {target}"
        is_source = target == source
        ranks = run_ranks(
            target.ranks, resume, as_dict(target), task, deep, folder, is_source, timeout=300
        )
        for got in ranks:
            assert got["state"] == {"position": SAVED * 8}, name
            assert same(got["held"], saved["held"]), name
            if is_source:
                assert got["curve"] == saved["curve"], name
                assert same(got["end"], saved["end"]), name
            for ours, theirs in zip(got["curve"], saved["curve"], strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), name


QUICK = [layout for layout in LAYOUTS if layout.ranks < 4 or layout == Layout(pp=2, tp=2, zero=1)]


def others(source: Layout, steps: tuple[int, ...], layouts: list[Layout]) -> list[Layout]:
    """Layouts so many places further in a list."""
    return [layouts[(layouts.index(source) + step) % len(layouts)] for step in steps]


@pytest.mark.parametrize("source", QUICK, ids=str)
def test_a_layout_restores_itself_bitwise_and_another_one_restores_it(source, tmp_path) -> None:
    check(source, [source, *others(source, (1,), QUICK)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_further_layouts_restore_it(source, tmp_path) -> None:
    itself = [] if source in QUICK else [source]
    check(source, [*itself, *others(source, (1, 2, 4, 7), LAYOUTS)], tmp_path)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Layout(dp=2, zero=3, offload="cpu"), Layout(tp=2)),
        (Layout(cp=2, zero=1), Layout(zero=2, offload="cpu")),
        pytest.param(
            Layout(pp=2, zero=1, offload="cpu"),
            Layout(dp=2, zero=2, offload="cpu"),
            marks=pytest.mark.slow,
        ),
        pytest.param(Layout(tp=2), Layout(dp=2, zero=3, offload="cpu"), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_offloaded_state_moves_like_any_other(source, target, tmp_path) -> None:
    check(source, [source, target], tmp_path)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Layout(tp=2), Layout(dp=2, zero=3, precision="bfloat16")),
        (Layout(pp=2, zero=1, precision="bfloat16"), Layout(dp=2, zero=2)),
        pytest.param(
            Layout(dp=2, zero=3, precision="bfloat16"),
            Layout(tp=2, zero=1, precision="bfloat16", offload="cpu"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_precision_changes_with_the_layout(source, target, tmp_path) -> None:
    """Float32 weights and moments move bit for bit; the curve within bfloat16's rounding."""
    of = ("masked", is_deep(source, target), tmp_path)
    saved = run_ranks(source.ranks, save, as_dict(source), *of, timeout=300)[0]
    for got in run_ranks(target.ranks, resume, as_dict(target), *of, False, timeout=300):
        assert same(got["held"], saved["held"])
        for (loss, norm), (want, want_norm) in zip(got["curve"], saved["curve"], strict=True):
            assert loss == pytest.approx(want, rel=1e-2)
            assert norm == pytest.approx(want_norm, rel=5e-2)
