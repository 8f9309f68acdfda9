"""Averaged weights in every layout: against a float64 recursion, across layouts, through resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from comparison import same
from harness import run_ranks
from layouts import TASKS, Layout, Trainer, as_dict, shallow

DECAY, STEPS, SAVED = 0.9, 4, 2
UNIFORM = shallow(TASKS["uniform"])
LAYOUTS = [
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(tp=2),
    Layout(pp=2, zero=1),
]
MORE = [
    Layout(tp=2, dp=2, zero=1),
    Layout(dp=2, zero=0),
    Layout(dp=2, zero=1),
    Layout(cp=2, zero=1),
    Layout(tp=2, dp=2, zero=3),
    Layout(pp=2, tp=2, zero=1),
]


def averages(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: trainer.engine.read(name, "ema").clone() for name in trainer.names()}


def live(trainer: Trainer) -> dict[str, torch.Tensor]:
    """What forward passes see on this rank, before ZeRO has any say."""
    seen = {}
    for name, p in trainer.engine.parameters.items():
        held = p.ds_tensor if hasattr(p, "ds_tensor") else p
        seen[name] = held.detach().clone()
    return seen


def run(
    layout: dict[str, Any], folder: Path | None = None, warmup: bool = True, each: bool = False
) -> dict[str, Any]:
    """Train; the averages, what an evaluation with them sees, and with `each` the weights after
    every update.

    Saves on the way, and once more in a fresh engine goes on from there.
    """
    from parallel.checkpoint import load_latest, save_checkpoint

    changes = {"ema_decay": DECAY, "ema_warmup": warmup}
    trainer = Trainer(Layout(**layout), UNIFORM, **changes)
    history, curve = [trainer.weights()] if each else [], []
    for step in range(STEPS):
        curve += trainer.train(step, step + 1)
        if each:
            history.append(trainer.weights())
        if folder is not None and step + 1 == SAVED:
            save_checkpoint(trainer.engine, folder, SAVED, {})
    weights = trainer.weights()
    before, raw = live(trainer), trainer.evaluate()
    with trainer.engine.using_ema():
        bound = trainer.evaluate()
    restored = same(live(trainer), before) and trainer.evaluate() == raw
    made = {
        "history": history,
        "ema": averages(trainer),
        "bound": bound,
        "raw": raw,
        "dp_rank": trainer.topology.dp_rank,
        "restored": restored and same(trainer.weights(), weights),
        "next": trainer.train(STEPS, STEPS + 1),
    }
    if folder is not None:
        again = Trainer(Layout(**layout), UNIFORM, **changes)
        load_latest(again.engine, folder)
        made["resumed"] = curve[SAVED:] == again.train(SAVED, STEPS)
        made["resumed"] = made["resumed"] and same(averages(again), made["ema"])
    return made


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run on one rank, and the folder of its checkpoint."""
    folder = tmp_path_factory.mktemp("reference")
    return run_ranks(1, run, as_dict(Layout()), folder, each=True)[0], folder


def _without_warmup() -> dict[str, Any]:
    return run_ranks(1, run, as_dict(Layout()), warmup=False, each=True)[0]


@pytest.mark.parametrize("warmup", [True, False])
def test_the_average_is_the_recursion_in_float64(reference, warmup) -> None:
    got = reference[0] if warmup else _without_warmup()
    for name, ema in got["ema"].items():
        want = got["history"][0][name].double()
        for n, weights in enumerate(got["history"][1:], start=1):
            d = min(DECAY, (1 + n) / (10 + n)) if warmup else DECAY
            want = d * want + (1 - d) * weights[name].double()
        assert torch.allclose(ema.double(), want, rtol=1e-6, atol=1e-8), name
        assert not torch.equal(ema, got["history"][-1][name]), name


@pytest.mark.parametrize(
    "layout", [*LAYOUTS, *(pytest.param(c, marks=pytest.mark.slow) for c in MORE)], ids=str
)
def test_every_layout_keeps_the_same_average(reference, layout, tmp_path) -> None:
    want, _ = reference
    ranks = run_ranks(layout.ranks, run, as_dict(layout), tmp_path, timeout=300)
    for got in ranks:
        assert got["restored"], "weights after an evaluation are those before it, bit for bit"
        assert got["resumed"], "a resumed run keeps the average of an uninterrupted one, bitwise"
        size = len(got["bound"])
        own = slice(got["dp_rank"] * size, (got["dp_rank"] + 1) * size)
        assert got["bound"] == pytest.approx(want["bound"][own], rel=1e-5)
        assert got["bound"] != pytest.approx(got["raw"], rel=1e-5), (
            "the two must be distinguishable"
        )
        for name, ema in got["ema"].items():
            moved = (want["ema"][name] - want["history"][0][name]).norm()
            assert (ema - want["ema"][name]).norm() <= 1e-3 * moved, name
    assert ranks[0]["next"][0] == pytest.approx(want["next"][0], rel=1e-5)


def load(layout: dict[str, Any], folder: Path, decay: float) -> dict[str, Any]:
    """Averages and weights right after loading, and the averages some steps later."""
    from parallel.checkpoint import load_latest

    trainer = Trainer(Layout(**layout), UNIFORM, ema_decay=decay)
    load_latest(trainer.engine, folder)
    if not decay:
        return {"kinds": trainer.engine.kinds}
    loaded, weights = averages(trainer), trainer.weights()
    trainer.train(SAVED, STEPS)
    return {"loaded": loaded, "weights": weights, "end": averages(trainer)}


@pytest.mark.parametrize(
    "layout", [Layout(dp=2, zero=3), Layout(pp=2, zero=1), Layout(tp=2, dp=2, zero=1)], ids=str
)
def test_averages_move_to_another_layout_bit_for_bit(reference, layout) -> None:
    from parallel.checkpoint import load_weights

    want, folder = reference
    saved = load_weights(folder / f"step-{SAVED:08d}", "ema")
    for got in run_ranks(layout.ranks, load, as_dict(layout), folder, DECAY):
        assert same(got["loaded"], saved)
        for name, ema in got["end"].items():
            moved = (want["ema"][name] - want["history"][0][name]).norm()
            assert (ema - want["ema"][name]).norm() <= 1e-3 * moved, name


def save_without(folder: Path) -> None:
    from parallel.checkpoint import save_checkpoint

    trainer = Trainer(Layout(), UNIFORM)
    trainer.train(0, SAVED)
    save_checkpoint(trainer.engine, folder, SAVED, {})


def test_averaging_can_begin_and_end_at_a_resume(reference, tmp_path) -> None:
    from parallel.checkpoint import load_weights
    from parallel.errors import CheckpointError

    run_ranks(1, save_without, tmp_path)
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_weights(tmp_path / f"step-{SAVED:08d}", "ema")
    got = run_ranks(2, load, as_dict(Layout(dp=2, zero=2)), tmp_path, DECAY)[0]
    assert same(got["loaded"], got["weights"])
    assert not same(got["end"], got["loaded"])
    _, folder = reference
    assert run_ranks(1, load, as_dict(Layout()), folder, 0.0)[0]["kinds"] == (
        "exp_avg",
        "exp_avg_sq",
    )


def overflow(layout: dict[str, Any]) -> bool:
    """A step whose gradient is not finite, after a good one; is everything as before?"""
    trainer = Trainer(Layout(**layout), shallow(TASKS["masked"]), ema_decay=DECAY)
    trainer.train(0, 1)
    before = averages(trainer)
    result = trainer.engine.step(trainer.batches(1), float("nan"), 1e-3)  # type: ignore[arg-type]
    assert not result.applied
    after = averages(trainer)
    trainer.train(1, 2)
    return same(before, after) and not same(averages(trainer), before)


@pytest.mark.parametrize("layout", [Layout(), Layout(dp=2, zero=1), Layout(dp=2, zero=3)], ids=str)
def test_a_step_that_is_skipped_leaves_the_average(layout) -> None:
    assert all(run_ranks(layout.ranks, overflow, as_dict(layout)))


def evaluate_both(run: Path) -> list[dict[str, Any]]:
    """What `epochal evaluate` says by default, and for either kind of weights."""
    from pretrain.evaluation.run import evaluate_run

    return [evaluate_run(run, weights=weights) for weights in (None, "ema", "raw")]


def test_training_reports_the_average_and_evaluate_repeats_it(pool, tmp_path) -> None:
    more = ("train.ema_decay=0.9", "evaluation.weights=both", "train.eval_epochs=[]")
    layout = ("parallel.data_parallel_size=2", "parallel.zero_stage=2")
    codes = run_ranks(2, runs.train, pool, tmp_path, "train.stop_step=4", *more, *layout)
    assert codes == [0, 0]
    logged = runs.log(tmp_path)[4]
    default, ema, raw = run_ranks(1, evaluate_both, tmp_path, launcher=False)[0]
    assert default == ema
    assert (ema["weights"], raw["weights"]) == ("ema", "raw")
    assert ema["nats_per_token"] == pytest.approx(logged["validation/nats_per_token"], rel=1e-6)
    assert raw["nats_per_token"] == pytest.approx(logged["validation_raw/nats_per_token"], rel=1e-6)
    assert ema["nats_per_token"] != pytest.approx(raw["nats_per_token"], rel=1e-4)
