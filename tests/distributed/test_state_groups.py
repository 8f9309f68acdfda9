"""An optimizer whose groups of parameters keep different state, in every kind of layout.

Layer matrices keep one tensor and no counter, all other parameters what Adam keeps. One rank's
curve, bitwise resume, checkpoints that move to any other layout, and the planner's bytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import same
from foreign import SPECS, layer_matrix
from harness import run_ranks
from layouts import TASKS, Layout, Trainer, shallow
from planned import held_and_planned

from parallel.errors import CheckpointError

SAVED, END = 2, 4
QUICK = [Layout(dp=2, zero=1), Layout(dp=2, zero=2), Layout(pp=2, zero=1)]
LAYOUTS = [
    *QUICK,
    Layout(dp=2),
    Layout(tp=2),
    Layout(dp=2, zero=3),
    Layout(dp=2, zero=1, precision="bfloat16"),
    Layout(dp=2, zero=2, offload="cpu"),
]
KEPT = {"matrix": {"velocity", "ema"}, "": {"exp_avg", "exp_avg_sq", "ema"}}


def trainer(layout: Layout) -> Trainer:
    return Trainer(layout, shallow(TASKS["masked"]), optimizer=SPECS["divided"], ema_decay=0.9)


def contents(made: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights, and of every parameter the state and average that it has."""
    engine = made.engine
    kinds = {name: ("weight", *engine.kinds_of(name)) for name in made.names()}
    return {f"{k}/{n}": engine.read(n, k).clone() for n, of in kinds.items() for k in of}


def journeys(layouts: list[Layout], folder: Path) -> list[dict[str, Any]]:
    """For each layout: train, save, train on; resume; resume what the layout before has saved."""
    from parallel.checkpoint import load_latest, save_checkpoint

    made: list[dict[str, Any]] = []
    for layout in layouts:
        there, first, again = folder / str(layout), trainer(layout), trainer(layout)
        curve = first.train(0, SAVED)
        save_checkpoint(first.engine, there, SAVED, {})
        held = contents(first)
        curve += first.train(SAVED, END)
        load_latest(again.engine, there)
        restored = same(contents(again), held)
        resumed = again.train(SAVED, END) == curve[SAVED:] and same(
            contents(again), contents(first)
        )
        moved = True
        if made:
            load_latest(again.engine, made[-1]["folder"])
            moved = same(contents(again), made[-1]["held"])
        made.append(
            {"curve": curve, "held": held, "folder": there}
            | {"restored": restored, "resumed": resumed, "moved": moved}
        )
    return made


@pytest.mark.parametrize("layouts", [QUICK, pytest.param(LAYOUTS, marks=pytest.mark.slow)])
def test_every_layout_keeps_of_each_parameter_what_its_group_declares(layouts, tmp_path) -> None:
    (alone,) = run_ranks(1, journeys, [Layout()], tmp_path / "one")[0]
    for results in run_ranks(2, journeys, layouts, tmp_path / "two", timeout=500):
        for layout, got in zip(layouts, results, strict=True):
            kinds: dict[str, set[str]] = {}
            for key, tensor in got["held"].items():
                kind, _, name = key.partition("/")
                if kind == "weight":
                    group = layer_matrix(name, tensor.shape)
                    kinds[name] = KEPT[group]
                else:
                    assert kind in kinds[name], f"{layout}: {key}"
            assert len(got["held"]) == sum(1 + len(kept) for kept in kinds.values())
            assert set(map(frozenset, kinds.values())) == set(map(frozenset, KEPT.values()))
            assert got["restored"], f"{layout}: a checkpoint holds every tensor bit for bit"
            assert got["resumed"], f"{layout}: a resumed run is the uninterrupted one, bit for bit"
            assert got["moved"], f"{layout}: any layout restores what another one has saved"
            close = 1e-5 if layout.precision == "float32" else 5e-2
            for ours, one in zip(got["curve"], alone["curve"], strict=True):
                assert ours == pytest.approx(one, rel=close), str(layout)


def exchange(folder: Path) -> dict[str, str]:
    """Refusals of checkpoints of AdamW, and of the same kinds of state of other parameters."""
    from dataclasses import replace

    from parallel.checkpoint import load_latest, save_checkpoint

    swapped = replace(
        SPECS["divided"], group_of=lambda name, shape: "" if layer_matrix(name, shape) else "matrix"
    )
    said = {}
    for name, spec in (("adamw", SPECS["adamw"]), ("swapped", swapped)):
        other = Trainer(Layout(dp=2, zero=1), shallow(TASKS["masked"]), optimizer=spec)
        other.train(0, 1)
        save_checkpoint(other.engine, folder / name, 1, {})
        try:
            load_latest(trainer(Layout(dp=2, zero=1)).engine, folder / name)
        except CheckpointError as error:
            said[name] = str(error)
    return said


def test_checkpoints_of_another_division_are_refused(tmp_path) -> None:
    said = run_ranks(2, exchange, tmp_path)[0]
    assert "it holds exp_avg, exp_avg_sq, divided keeps exp_avg, exp_avg_sq, v" in said["adamw"]
    assert "divided keeps exp_avg, exp_avg_sq, velocity of other parameters" in said["swapped"]


def test_the_planner_counts_the_state_of_each_group_to_the_byte() -> None:
    layouts = [layout for layout in LAYOUTS if layout.offload == "none"]
    cases = [
        (layout, "masked", number % 2 == 0, "divided") for number, layout in enumerate(layouts)
    ]
    for rank, results in enumerate(run_ranks(2, held_and_planned, cases, timeout=300)):
        for case, held in zip(cases, results, strict=True):
            for what, (real, planned) in held.items():
                assert real == planned, f"{case}, rank {rank}: {what}"
