"""Dropout over ranks: replicas drop alike, parts differ, and a killed run goes on bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from comparison import assert_same_run
from harness import Died, run_ranks
from layouts import TASKS, Layout, Task, Trainer, as_dict, shallow

STEPS = 4
DROPS = {"dropout": 0.2, "attention_dropout": 0.2}


def train(layout: dict[str, Any], drops: dict[str, float], name: str) -> dict[str, Any]:
    """A few steps with dropout: curve, and what this rank holds of weights that all hold alike."""
    from parallel.layers import partition_dim

    task = shallow(TASKS[name])
    trainer = Trainer(Layout(**layout), Task(task.objective, {**task.model, **drops}))
    curve = trainer.train(0, STEPS)
    replicated = {
        parameter_name: parameter.detach().clone()
        for parameter_name, parameter in trainer.engine.parameters.items()
        if partition_dim(parameter) is None
    }
    return {"curve": curve, "replicated": replicated}


@pytest.mark.parametrize(
    "layout",
    [
        Layout(tp=2, recompute="full", chunk=20),
        Layout(pp=2, zero=1, recompute="selective"),
        Layout(tp=2, sp=True),
        Layout(cp=2, zero=1, recompute="full"),
    ],
    ids=str,
)
def test_replicas_stay_equal_and_masks_of_the_same_activations_are_the_same(layout: Layout) -> None:
    """Where ranks hold whole activations, the run is that of one rank; elsewhere only alike."""
    drops = dict(DROPS)
    if layout.tp > 1 and not layout.sp:
        del drops["attention_dropout"]  # heads are sharded, and drop for themselves
    name = "uniform" if layout.pp == 1 else "masked"
    results = run_ranks(layout.ranks, train, as_dict(layout), drops, name)
    if layout.pp == 1:
        assert results[0]["replicated"].keys() == results[1]["replicated"].keys()
        for parameter, weight in results[0]["replicated"].items():
            assert torch.equal(results[1]["replicated"][parameter], weight), parameter
    assert results[0]["curve"] == results[1]["curve"]
    alone = run_ranks(1, train, as_dict(Layout()), drops, name)[0]
    same = [
        ours == pytest.approx(theirs, rel=1e-5)
        for ours, theirs in zip(results[0]["curve"], alone["curve"], strict=True)
    ]
    assert not any(same) if layout.sp or layout.cp > 1 else all(same)


def masks(layout: dict[str, Any]) -> list[torch.Tensor]:
    """What this rank drops of the residual stream, and of attention weights."""
    from pretrain.model.dropout import dropout, seeded

    task = Task({"name": "autoregressive"}, DROPS)
    key = Trainer(Layout(**layout), task).engine.module.model._dropout_key(5)
    ones = torch.ones(500)
    with seeded(ones.device, key.of(f"attention weights/{key.heads}")):
        heads = torch.rand(500)
    return [dropout(ones, 0.5, key, "mlp"), heads]


@pytest.mark.parametrize(
    ("layout", "same_residual"),
    [(Layout(tp=2), True), (Layout(tp=2, sp=True), False), (Layout(cp=2, zero=1), False)],
    ids=str,
)
def test_ranks_drop_the_same_of_the_same_and_different_elements_of_different_parts(
    layout: Layout, same_residual: bool
) -> None:
    first, second = run_ranks(2, masks, as_dict(layout))
    assert torch.equal(first[0], second[0]) == same_residual
    if not same_residual:
        assert 0.4 < float((first[0] == second[0]).double().mean()) < 0.6
    assert not torch.equal(first[1], second[1])


def test_a_run_that_drops_and_dies_twice_is_bitwise_the_undisturbed_one(
    pool: Path, tmp_path: Path
) -> None:
    layout = [
        "parallel.tensor_parallel_size=2",
        "parallel.sequence_parallel=true",
        "model.dropout=0.1",
        "model.attention_dropout=0.1",
        "train.micro_batch_size=4",
        "train.stop_step=6",
        "train.checkpoint_interval=2",
        "train.eval_epochs=[]",
        "evaluation.sequences=8",
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_ranks(2, runs.train, pool, whole, *layout) == [0, 0]
    for step, recompute in ((3, "selective"), (5, "full")):
        more = [*layout, f"train.recompute={recompute}"]
        died = run_ranks(
            2, runs.train, pool, killed, *more, may_die=True, kill_at=step, when="after"
        )
        assert died == [Died(-9)] * 2
    assert run_ranks(2, runs.train, pool, killed, *layout) == [0, 0]
    assert_same_run(killed, whole, step=6)
    plain = tmp_path / "plain"
    undropped = [o for o in layout if "dropout" not in o and "stop_step" not in o]
    assert run_ranks(2, runs.train, pool, plain, *undropped, "train.stop_step=1") == [0, 0]
    assert runs.log(plain)[1]["train/loss"] != runs.log(whole)[1]["train/loss"]
