"""The end of a run by its evaluations: at the same step on every rank and after every death."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from comparison import assert_same_run
from harness import Died, run_ranks

RULE = (
    "objective=masked",
    "train.eval_interval=2",
    "train.patience=2",
    "train.min_delta=10",  # only the first evaluation, at step 2, is an improvement
)
LAST = 6
"""Step of the third evaluation."""
ALONE = "parallel.zero_stage=0"


@pytest.fixture(scope="module")
def stopped(pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that its evaluations ended."""
    run = tmp_path_factory.mktemp("stopped")
    assert run_ranks(1, runs.train, pool, run, *RULE, ALONE, launcher=False) == [0]
    return run


def status(run: Path) -> dict[str, Any]:
    return json.loads((run / "status.json").read_text())


def test_a_run_ends_when_its_evaluations_no_longer_improve(stopped: Path) -> None:
    stated = status(stopped)
    assert (stated["state"], stated["step"], stated["exit_code"]) == ("finished", LAST, 0)
    assert "train.patience: 2 evaluations without improvement" in stated["message"]
    log = runs.log(stopped)
    assert [s for s in log if "validation/nats_per_token" in log[s]] == [2, 4, 6]
    state = runs.checkpoint(stopped, LAST)["state"]["train"]
    assert state["evaluations_without_improvement"] == 2
    assert state["reference_loss"] == log[2]["validation/nats_per_token"]
    assert state["lowest_loss"] == min(log[s]["validation/nats_per_token"] for s in (2, 4, 6))


@pytest.mark.parametrize("when", ["before", "after", "saving"])
def test_a_killed_run_ends_where_the_undisturbed_one_does(
    pool: Path, tmp_path: Path, stopped: Path, when: str
) -> None:
    """Killed at the step of the second evaluation and of the checkpoint, or at the last one."""
    step = LAST if when == "before" else 4
    words = (*RULE, ALONE)
    died = run_ranks(
        1, runs.train, pool, tmp_path, *words, launcher=False, may_die=True, kill_at=step, when=when
    )
    assert died == [Died(-9)]
    assert run_ranks(1, runs.train, pool, tmp_path, *words, launcher=False) == [0]
    assert_same_run(tmp_path, stopped, LAST)
    assert status(tmp_path) == status(stopped)


def test_the_same_command_leaves_a_stopped_run_and_more_patience_goes_on(
    pool: Path, tmp_path: Path, undisturbed
) -> None:
    words = (*RULE, ALONE)
    for _ in range(2):
        assert run_ranks(1, runs.train, pool, tmp_path, *words, launcher=False) == [0]
        assert status(tmp_path)["step"] == LAST
    more = ("train.patience=3",)
    assert run_ranks(1, runs.train, pool, tmp_path, *words, *more, launcher=False) == [0]
    assert status(tmp_path)["step"] == 8
    assert run_ranks(1, runs.train, pool, tmp_path, *words, "train.patience=0", launcher=False) == [
        0
    ]
    assert status(tmp_path) == {
        "state": "finished",
        "step": runs.STEPS,
        "message": "",
        "exit_code": 0,
    }
    reference = runs.log(undisturbed("objective=masked"))
    assert runs.log(tmp_path)[runs.STEPS]["train/loss"] == reference[runs.STEPS]["train/loss"]


@pytest.mark.parametrize("layout", ["zero_stage=1", "tensor_parallel_size=2"])
def test_all_ranks_end_at_the_same_step(
    pool: Path, tmp_path: Path, stopped: Path, layout: str
) -> None:
    more = (*RULE, "train.keep_best=true", f"parallel.{layout}")
    assert run_ranks(2, runs.train, pool, tmp_path, *more) == [0, 0]
    ours, theirs = status(tmp_path), status(stopped)
    assert (ours["state"], ours["step"]) == (theirs["state"], theirs["step"])
    assert [path.name for path in (tmp_path / "best").glob("step-*")] == ["step-00000006"]


def test_the_checkpoint_of_the_lowest_evaluation_is_kept(pool: Path, tmp_path: Path) -> None:
    """A learning rate that ruins the model makes an early evaluation the best."""
    more = ("objective=autoregressive", "optimizer.lr=0.3", "optimizer.clip_grad_norm=100", ALONE)
    more += ("train.eval_interval=2", "train.keep_best=true", "train.keep_checkpoints=1")
    assert run_ranks(1, runs.train, pool, tmp_path, *more, launcher=False) == [0]
    log = runs.log(tmp_path)
    losses = {
        s: r["validation/nats_per_token"]
        for s, r in log.items()
        if "validation/nats_per_token" in r
    }
    best = min(losses, key=lambda step: losses[step])
    assert best < max(losses)
    (kept,) = (tmp_path / "best").glob("step-*")
    assert kept.name == f"step-{best:08d}"
    assert [p.name for p in (tmp_path / "checkpoints").glob("step-*")] == ["step-00000015"]
    state = json.loads((kept / "manifest.json").read_text())["state"]["train"]
    assert (state["step"], state["lowest_loss"]) == (best, losses[best])
