"""Signals become one decision of all ranks; a gradient that is not finite ends the run cleanly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import runs
from harness import run_ranks


def train_with_signal(pool: Path, run: Path, rank: int, step: int) -> int:
    """The train loop, in which one rank alone receives SIGTERM during a step."""
    from pretrain import train
    from pretrain.training import hooks

    original = hooks.Hooks.after_step

    def after_step(self, *arguments):
        if self.session.state.step == step and self.session.topology.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *arguments)

    hooks.Hooks.after_step = after_step
    return train.main(runs.overrides(pool, run, "objective=masked"))


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(pool: Path, tmp_path: Path, rank: int):
    """Rank-local decisions would save different steps on different ranks, or hang."""
    assert run_ranks(2, train_with_signal, pool, tmp_path, rank, 6) == [75, 75]
    status = json.loads((tmp_path / "status.json").read_text())
    assert status == {"state": "preempted", "step": 6, "message": "", "exit_code": 75}
    assert (tmp_path / "checkpoints" / "step-00000006" / "manifest.json").is_file()
    assert run_ranks(2, runs.train, pool, tmp_path, "objective=masked") == [0, 0]
    assert sorted(runs.log(tmp_path)) == list(range(1, 16))


def train_with_nan(pool: Path, run: Path, rank: int, step: int, *more: str) -> int:
    """The train loop, in which one rank's corruption is poisoned once."""
    from pretrain import train
    from pretrain.objectives.masked import Masked

    original, calls = Masked.corrupt, []

    def corrupt(self, clean, noise):
        calls.append(None)
        batch = original(self, clean, noise)
        if len(calls) == step and int(os.environ["RANK"]) == rank:
            batch.weight.fill_(float("nan"))
        return batch

    Masked.corrupt = corrupt
    return train.main(runs.overrides(pool, run, "objective=masked", *more))


@pytest.mark.parametrize("zero_stage", [0, pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_gradient_that_is_not_finite_saves_the_weights_before_it_and_stops(
    pool: Path, tmp_path: Path, zero_stage: int
):
    more = (f"parallel.zero_stage={zero_stage}",)
    assert run_ranks(2, train_with_nan, pool, tmp_path / "bad", 1, 6, *more) == [5, 5]
    status = json.loads((tmp_path / "bad" / "status.json").read_text())
    assert status["state"] == "failed"
    assert "step 6" in status["message"]
    good = ("objective=masked", *more, "train.stop_step=5")
    assert run_ranks(2, runs.train, pool, tmp_path / "good", *good) == [0, 0]
    ours, theirs = (runs.checkpoint(tmp_path / name, 5) for name in ("bad", "good"))
    assert set(ours) == set(theirs)
    for name in set(ours) - {"state"}:
        assert ours[name].equal(theirs[name]), name
