"""Checkpoints on real ranks: exact resume, other layouts, other precision, no engine at all."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from comparison import same
from harness import run_ranks
from toy_runs import CURSOR, build, everything, go, resume_and_go_on, save_and_go_on

from parallel.checkpoint import latest_checkpoint, load_weights, read_manifest


@pytest.mark.parametrize(
    ("ranks", "tp", "zero", "precision"),
    [
        (1, 1, 0, "float32"),
        (2, 1, 1, "float32"),
        (2, 2, 1, "float32"),
        (2, 1, 1, "bfloat16"),
        (2, 1, 2, "bfloat16"),
        # test_reshard.py restores these bitwise with the real model.
        pytest.param(1, 1, 1, "float32", marks=pytest.mark.slow),
        pytest.param(2, 1, 0, "float32", marks=pytest.mark.slow),
        pytest.param(2, 1, 2, "float32", marks=pytest.mark.slow),
        pytest.param(2, 2, 0, "float32", marks=pytest.mark.slow),
    ],
)
def test_resume_in_the_same_layout_is_bitwise_also_after_two_interruptions(
    tmp_path, ranks, tp, zero, precision
) -> None:
    whole = run_ranks(ranks, save_and_go_on, tmp_path, tp, zero, (2,), 6, precision=precision)
    curve, at_save, end = whole[0]
    second = run_ranks(ranks, resume_save_and_go_on, tmp_path, tp, zero, 4, precision=precision)
    third = run_ranks(ranks, resume_and_go_on, tmp_path, tp, zero, 6, precision=precision)
    state, _, rest, again = third[0]
    assert state == CURSOR
    assert same(second[0][0], at_save)
    assert second[0][1] + rest == curve[2:]
    assert same(again, end)
    assert json.loads((tmp_path / "step-00000004" / "manifest.json").read_text())["step"] == 4


def resume_save_and_go_on(folder: Path, tp: int, zero: int, stop: int, **changes):
    """Load, train to `stop`, save there."""
    from parallel.checkpoint import load_latest, save_checkpoint

    engine = build(tp, zero, **changes)
    path, _ = load_latest(engine, folder)
    restored = everything(engine)
    curve = go(engine, read_manifest(path).step, stop)
    save_checkpoint(engine, folder, stop, CURSOR)
    return restored, curve


LAYOUTS = {
    "1 rank, stage 0": (1, 1, 0),
    "1 rank, stage 1": (1, 1, 1),
    "dp2, stage 0": (2, 1, 0),
    "dp2, stage 1": (2, 1, 1),
    "dp2, stage 2": (2, 1, 2),
    "tp2, stage 0": (2, 2, 0),
    "tp2, stage 2": (2, 2, 2),
    "tp2 x dp2, stage 1": (4, 2, 1),
}
SOURCES = list(LAYOUTS)[::2]
SLOW = pytest.mark.slow


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(layout)`: its checkpoint at step 3, the curve to step 6 and all tensors at both."""

    @cache
    def made(name: str):
        ranks, tp, zero = LAYOUTS[name]
        folder = tmp_path_factory.mktemp("saved")
        return folder, run_ranks(ranks, save_and_go_on, folder, tp, zero, (3,), 6)[0]

    return made


@pytest.mark.parametrize(
    ("source", "further"),
    [
        *((source, (1,)) for source in SOURCES),
        *(
            pytest.param(source, (2, 4, 7) if source in SOURCES else (1, 2, 4, 7), marks=SLOW)
            for source in LAYOUTS
        ),
    ],
)
def test_any_layout_resumes_what_any_other_saved(saved, source, further) -> None:
    """Every layout is once a source or a target; in the slow suite a source for four."""
    folder, (curve, at_save, _) = saved(source)
    names = list(LAYOUTS)
    for target in [names[(names.index(source) + k) % len(names)] for k in further]:
        ranks, tp, zero = LAYOUTS[target]
        state, restored, rest, _ = run_ranks(ranks, resume_and_go_on, folder, tp, zero, 6)[0]
        assert state == CURSOR, target
        assert same(restored, at_save), f"{source} -> {target}"
        for (loss, norm), (want_loss, want_norm) in zip(rest, curve[3:], strict=True):
            assert loss == pytest.approx(want_loss, rel=1e-5), f"{source} -> {target}"
            assert norm == pytest.approx(want_norm, rel=1e-5), f"{source} -> {target}"


def resume_as_bfloat16(folder: Path):
    from parallel.checkpoint import load_latest

    engine = build(1, 1, precision="bfloat16")
    load_latest(engine, folder)
    live = {n: p.detach().clone() for n, p in engine.parameters.items()}
    return everything(engine), live


def test_precision_may_change_and_the_float32_weights_stay(saved) -> None:
    folder, (_, at_save, _) = saved("dp2, stage 0")
    restored, live = run_ranks(2, resume_as_bfloat16, folder)[0]
    assert same(restored, at_save)
    for name, weight in live.items():
        assert weight.dtype == torch.bfloat16
        assert torch.equal(weight, at_save[f"weight/{name}"].bfloat16())


def test_weights_are_readable_without_an_engine(saved) -> None:
    for folder, (_, at_save, _) in map(saved, SOURCES):
        weights = load_weights(folder / "step-00000003")
        assert same(
            {f"weight/{k}": v for k, v in weights.items()},
            {k: v for k, v in at_save.items() if k.startswith("weight/")},
        )


def assign(folder: Path) -> bool:
    """Weights into a bare model on two tensor-parallel ranks; same loss as the engine's?"""
    import toy

    from parallel.checkpoint import assign_weights, load_checkpoint

    engine = build(2, 0)
    bare = toy.ToyModel(engine.topology)
    path = latest_checkpoint(folder)
    load_checkpoint(engine, path)
    assign_weights(bare, load_weights(path), engine.topology)
    batch = toy.global_batch(5)
    return torch.equal(bare(batch), engine.module(batch))


def test_weights_enter_a_bare_tensor_parallel_model(saved) -> None:
    assert all(run_ranks(2, assign, saved("1 rank, stage 0")[0]))
