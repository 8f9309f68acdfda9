"""Branches of a constant-rate run: each is the run of its own length, bit for bit, at less cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import runs
from comparison import assert_same_checkpoint
from harness import Died, RankError, run_ranks

SCHEDULE = ("optimizer.schedule.warmup=3", "optimizer.schedule.decay=0.25", "train.eval_epochs=[]")
DECAY = (*SCHEDULE, "optimizer.schedule.name=wsd")
EPOCHS = {1.7: (80, 7, 10), 2.5: (118, 11, 15)}
"""Positions of a run of so many epochs of 47 sequences, step of 8 sequences that ends at or before
its decay's start (positions 60 and 88.5), last step."""
CHOSEN = {
    "autoregressive": ("objective=autoregressive", "train.ema_decay=0.9"),
    "masked": ("objective=masked", "model.dropout=0.1"),
}


def trunk_of(*chosen: str) -> tuple[str, ...]:
    """Settings of the trunk: constant rate up to the last decay, a kept checkpoint at the first."""
    return (
        *chosen,
        *SCHEDULE,
        "optimizer.schedule.name=constant",
        f"data.epochs={88 / 47}",
        f"train.checkpoint_epochs=[{60 / 47}]",
        "train.keep_checkpoints=1",
        "train.checkpoint_interval=3",
    )


def train(pool: Path, run: Path, *more: str, ranks: int = 1, **how: Any) -> None:
    """A run that ends well, or dies where it is told to."""
    launcher = ranks > 1
    ended = run_ranks(ranks, runs.train, pool, run, *more, launcher=launcher, **how)
    assert ended == ([Died(-9)] if "kill_at" in how else [0]) * ranks


def names(run: Path) -> list[str]:
    """Checkpoints of a run."""
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def state(run: Path, step: int) -> dict[str, Any]:
    """State in the manifest of a checkpoint."""
    manifest = run / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    return json.loads(manifest.read_text())["state"]


def assert_same_end(branch: Path, separate: Path, epochs: float) -> None:
    """Every measurement after the branch's start, and the last checkpoint, bit for bit."""
    _, start, end = EPOCHS[epochs]
    ours, theirs = runs.log(branch), runs.log(separate)
    assert list(ours) == list(range(start + 1, end + 1))
    assert ours == {step: record for step, record in theirs.items() if step > start}
    assert "validation/nats_per_token" in ours[end]
    assert_same_checkpoint(branch, separate, end)
    mine, other = state(branch, end), state(separate, end)
    for key in ("objective", "schedule", "train"):
        assert mine[key] == other[key]


@pytest.mark.parametrize("objective", CHOSEN)
def test_a_branch_is_bitwise_the_separate_run(pool: Path, tmp_path: Path, objective: str) -> None:
    """Decays that start between two steps, after fractional epochs; all parts die and resume."""
    chosen, trunk = CHOSEN[objective], tmp_path / "trunk"
    constant = trunk_of(*chosen)
    train(pool, trunk, *constant, kill_at=10, when="after", may_die=True)
    assert "step-00000007" in names(trunk)
    train(pool, trunk, *constant)
    assert names(trunk) == ["step-00000007", "step-00000011"]
    for epochs, (positions, start, end) in EPOCHS.items():
        separate, branch = tmp_path / f"separate-{epochs}", tmp_path / f"branch-{epochs}"
        decay = (*chosen, *DECAY, f"data.epochs={epochs}")
        train(pool, separate, *decay)
        assert state(separate, end)["train"]["position"] == positions
        origin = (*decay, f"run.branch_from={trunk}")
        dies = (*origin, "train.async_checkpoint=false")
        train(pool, branch, *dies, kill_at=end - 1, when="after", may_die=True)
        moved = trunk.rename(tmp_path / "elsewhere")  # a resumed branch does not need it
        train(pool, branch, *origin)
        moved.rename(trunk)
        assert_same_end(branch, separate, epochs)
        recorded = state(branch, end)["origin"]
        assert recorded["path"] == str(trunk / "checkpoints" / f"step-{start:08d}")
        assert (recorded["step"], recorded["position"]) == (start, 8 * start)


@pytest.mark.parametrize("epochs", [pytest.param(1.7, marks=pytest.mark.slow), 2.5])
def test_a_branch_on_two_ranks_is_bitwise_the_separate_run(
    pool: Path, tmp_path: Path, epochs: float
) -> None:
    chosen = (*CHOSEN["masked"], "parallel.zero_stage=1")
    trunk, branch, separate = (tmp_path / name for name in ("trunk", "branch", "separate"))
    train(pool, trunk, *trunk_of(*chosen), ranks=2)
    decay = (*chosen, *DECAY, f"data.epochs={epochs}")
    train(pool, separate, *decay, ranks=2)
    train(pool, branch, *decay, f"run.branch_from={trunk}", ranks=2)
    assert_same_end(branch, separate, epochs)


def test_a_branch_may_have_another_layout(pool: Path, tmp_path: Path) -> None:
    """Origin on one rank, branch on two that share the tensors: the curve of the separate run."""
    chosen = ("objective=autoregressive", "train.ema_decay=0.9")
    trunk, branch, separate = (tmp_path / name for name in ("trunk", "branch", "separate"))
    train(pool, trunk, *trunk_of(*chosen))
    decay = (*chosen, *DECAY, "data.epochs=2.5")
    train(pool, separate, *decay)
    layout = ("parallel.tensor_parallel_size=2", "parallel.zero_stage=1")
    train(pool, branch, *decay, *layout, f"run.branch_from={trunk}", ranks=2)
    ours, theirs = runs.log(branch), runs.log(separate)
    assert list(ours) == list(range(12, 16))
    for step, record in ours.items():
        assert record == pytest.approx(theirs[step], rel=1e-5)


def test_an_origin_that_changes_while_a_branch_starts_is_refused(
    pool: Path, tmp_path: Path
) -> None:
    """What the command has chosen is what the ranks load, or they say why not."""
    trunk, branch = tmp_path / "trunk", tmp_path / "branch"
    train(pool, trunk, "objective=masked", *SCHEDULE, "train.stop_step=8")
    args = (pool, branch, trunk, "objective=masked", *DECAY)
    with pytest.raises(RankError, match=r"has changed since this start: its manifest has the hash"):
        run_ranks(1, begin_after_a_change, *args, launcher=False)
    with pytest.raises(RankError, match=r"belongs to another data stream:\n +seed: saved 17, now"):
        run_ranks(1, begin_with_another_seed, *args, launcher=False)


def begin_after_a_change(pool: Path, run: Path, trunk: Path, *more: str) -> None:
    """Open a session after the manifest of the chosen checkpoint was written again."""
    from parallel.runtime import init_distributed
    from pretrain.config.compose import compose
    from pretrain.config.preflight import preflight
    from pretrain.training.session import open_session

    config = preflight(compose(runs.overrides(pool, run, *more, f"run.branch_from={trunk}")))
    assert config.run.branch_from is not None
    manifest = config.run.branch_from / "manifest.json"
    manifest.write_text(manifest.read_text() + " ")
    open_session(config, init_distributed(1))


def begin_with_another_seed(pool: Path, run: Path, trunk: Path, *more: str) -> None:
    """Open a session without what preflight compares."""
    from parallel.runtime import init_distributed
    from pretrain.config.compose import compose
    from pretrain.config.run import resolve
    from pretrain.training.session import open_session

    origin = trunk / "checkpoints" / "step-00000008"
    other = (*more, f"run.branch_from={origin}", "run.seed=18")
    open_session(resolve(compose(runs.overrides(pool, run, *other))), init_distributed(1))
