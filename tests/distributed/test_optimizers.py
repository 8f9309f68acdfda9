"""Optimizers that the package does not know, in every kind of layout, by their declaration alone.

Each holds the same as AdamW does elsewhere: one rank's curve, bitwise resume, checkpoints that move
to any other layout, averages, and the planner's bytes. All layouts share one process group.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from comparison import same
from foreign import SPECS
from harness import run_ranks
from layouts import TASKS, Layout, Trainer, shallow
from planned import held_and_planned, hosted_and_planned

from parallel.engine.optimizer import StateTensor
from parallel.errors import CheckpointError, LayoutError, OptimizerError

SAVED, END = 2, 3
LAYOUTS = [
    Layout(dp=2),
    Layout(dp=2, zero=1),
    Layout(dp=2, zero=2),
    Layout(dp=2, zero=3),
    Layout(tp=2),
    Layout(pp=2, zero=1),
    Layout(dp=2, zero=1, precision="bfloat16"),
    Layout(dp=2, zero=2, offload="cpu"),
    Layout(dp=2, zero=3, precision="bfloat16", offload="cpu"),
]


def trainer(layout: Layout, optimizer: str) -> Trainer:
    return Trainer(layout, shallow(TASKS["masked"]), optimizer=SPECS[optimizer], ema_decay=0.9)


def contents(made: Trainer) -> dict[str, torch.Tensor]:
    """Whole weights, state and averages."""
    kinds = ("weight", *made.engine.kinds)
    return {f"{k}/{n}": made.engine.read(n, k).clone() for n in made.names() for k in kinds}


def journeys(layouts: list[Layout], optimizer: str, folder: Path) -> list[dict[str, Any]]:
    """For each layout: train, save, train on; resume; resume what the layout before has saved."""
    from parallel.checkpoint import load_latest, save_checkpoint

    made, before = [], {}
    for layout in layouts:
        there = folder / str(layout)
        first = trainer(layout, optimizer)
        curve = first.train(0, SAVED)
        save_checkpoint(first.engine, there, SAVED, {})
        held = contents(first)
        curve += first.train(SAVED, END)
        again = trainer(layout, optimizer)
        load_latest(again.engine, there)
        restored = same(contents(again), held)
        rest = again.train(SAVED, END)
        resumed = rest == curve[SAVED:] and same(contents(again), contents(first))
        moved = True
        if before:  # into an engine that has trained, which must leave no trace
            load_latest(again.engine, before["folder"])
            moved = same(contents(again), before["held"])
        before = {"folder": there, "held": held}
        made.append(
            {"curve": curve, "end": contents(first), "kinds": first.engine.kinds}
            | {"restored": restored, "resumed": resumed, "moved": moved}
        )
    return made


@pytest.mark.parametrize(
    ("optimizer", "layouts"),
    [
        ("momentum", LAYOUTS[::2]),
        ("scaled", LAYOUTS[1::2]),
        pytest.param("momentum", LAYOUTS[1::2], marks=pytest.mark.slow),
        pytest.param("scaled", LAYOUTS[::2], marks=pytest.mark.slow),
    ],
)
def test_every_layout_trains_resumes_and_takes_over_what_another_saved(
    optimizer, layouts, tmp_path
) -> None:
    """One optimizer in each layout, in turn; in the slow suite the other one."""
    (alone,) = run_ranks(1, journeys, [Layout()], optimizer, tmp_path / "one")[0]
    for results in run_ranks(2, journeys, layouts, optimizer, tmp_path / "two", timeout=500):
        for layout, got in zip(layouts, results, strict=True):
            assert got["kinds"] == (*SPECS[optimizer].names, "ema")
            assert got["restored"], f"{layout}: a checkpoint holds every tensor bit for bit"
            assert got["resumed"], f"{layout}: a resumed run is the uninterrupted one, bit for bit"
            assert got["moved"], f"{layout}: any layout restores what another one has saved"
            exact = layout.precision == "float32"
            for ours, one in zip(got["curve"], alone["curve"], strict=True):
                assert ours == pytest.approx(one, rel=1e-5 if exact else 5e-2), str(layout)
            if exact and optimizer == "momentum":  # bfloat16 state jumps where rounding does
                for name, tensor in alone["end"].items():
                    error = (got["end"][name] - tensor).norm()
                    assert error <= 1e-4 * tensor.norm() + 1e-7, f"{layout}: {name}"


def faults(folder: Path) -> dict[str, Any]:
    """Answers to wrong declarations, layouts and checkpoints, and to an infinite gradient."""
    from parallel.checkpoint import load_latest, save_checkpoint

    said: dict[str, Any] = {}
    for name, spec in {
        "undeclared": replace(SPECS["scaled"], state=(StateTensor("debt"),)),
        "counted": replace(SPECS["momentum"], counter="tensor"),
        "typed": replace(SPECS["momentum"], state=(StateTensor("velocity", "bfloat16"),)),
    }.items():
        for zero in (0, 3):
            try:
                Trainer(Layout(dp=2, zero=zero), shallow(TASKS["masked"]), optimizer=spec).train(
                    0, 1
                )
            except OptimizerError as error:
                said[f"{name} {zero}"] = str(error)
    for layout in (Layout(dp=2, zero=1), Layout(tp=2), Layout(dp=2)):
        try:
            trainer(layout, "whole").train(0, 1)
        except LayoutError as error:
            said[str(layout)] = str(error)
    made = Trainer(Layout(dp=2, zero=1), shallow(TASKS["masked"]))
    made.train(0, 1)
    save_checkpoint(made.engine, folder, 1, {})
    other = trainer(Layout(dp=2), "momentum")
    try:
        load_latest(other.engine, folder)
    except CheckpointError as error:
        said["checkpoint"] = str(error)
    other.train(0, 1)
    before = contents(other)
    result = other.engine.step(other.batches(1), float("nan"), 1e-3)  # type: ignore[arg-type]
    said["applied"], said["untouched"] = result.applied, same(contents(other), before)
    other.train(1, 2)
    said["goes on"] = not same(contents(other), before)
    return said


def test_wrong_declarations_layouts_and_checkpoints_are_refused(tmp_path) -> None:
    said = run_ranks(2, faults, tmp_path, timeout=300)[0]
    for zero in (0, 3):
        assert "scaled declares the state {'debt': 'float32'}" in said[f"undeclared {zero}"]
        assert "keeps {'square': 'bfloat16', 'debt': 'float32'}" in said[f"undeclared {zero}"]
        assert "no counter step" in said[f"counted {zero}"]
        assert "keeps {'velocity': 'float32'}" in said[f"typed {zero}"]
    assert "whole tensors and needs parallel.zero_stage 0" in said["dp2-zero1"]
    assert "whole tensors and needs parallel.tensor_parallel_size 1, not 2" in said["tp2-zero0"]
    assert "dp2-zero0" not in said
    assert "it holds exp_avg, exp_avg_sq, momentum keeps velocity. Use" in said["checkpoint"]
    assert not said["applied"]
    assert said["untouched"]
    assert said["goes on"]


@pytest.mark.parametrize("turn", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_planner_counts_declared_state_to_the_byte(turn: int) -> None:
    layouts = [layout for layout in LAYOUTS if layout.offload == "none"]
    cases = [
        (layout, "masked", number % 3 == 0, ("momentum", "scaled")[(number + turn) % 2])
        for number, layout in enumerate(layouts)
    ]
    for rank, results in enumerate(run_ranks(2, held_and_planned, cases, timeout=300)):
        for case, held in zip(cases, results, strict=True):
            for what, (real, planned) in held.items():
                assert real == planned, f"{case}, rank {rank}: {what}"


def test_the_planner_counts_offloaded_state() -> None:
    layouts = [layout for layout in LAYOUTS if layout.offload != "none"]
    for optimizer in ("momentum", "scaled"):
        for results in run_ranks(2, hosted_and_planned, layouts, optimizer, timeout=300):
            for layout, (stay, planned, hosted, host) in zip(layouts, results, strict=True):
                assert stay == planned, str(layout)
                assert host == pytest.approx(hosted, rel=0.03), str(layout)
