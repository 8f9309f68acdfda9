"""Signals become one decision of all ranks; a gradient that is not finite ends the run cleanly."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import runs
from comparison import assert_same_run
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


def train_with_a_stopped_rank(pool: Path, run: Path, rank: int, step: int) -> int:
    """The train loop, in which a rank stops without a word; the other tells what it met."""
    import time

    from parallel import silence
    from pretrain import train
    from pretrain.training import hooks

    original = hooks.Hooks.after_step

    def after_step(self, *arguments):
        if self.session.state.step == step and self.session.topology.rank == rank:
            time.sleep(12)
            os._exit(9)
        original(self, *arguments)

    hooks.Hooks.after_step = after_step
    silence.silent_ranks.__defaults__ = (1.0,)  # both ranks of this test are waiting already
    return train.main(
        runs.overrides(pool, run, "objective=masked", "parallel.timeout_minutes=0.05")
    )


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_rank_that_does_not_answer_is_named_in_time(pool: Path, tmp_path: Path, rank: int):
    """Three seconds, not the half hour that groups of torch, DeepSpeed and megatron wait."""
    results = run_ranks(2, train_with_a_stopped_rank, pool, tmp_path, rank, 6, may_die=True)
    assert results[1 - rank] == 6
    stated = tmp_path / ("status.json" if rank == 1 else "failure.json")
    message = json.loads(stated.read_text())["message"]
    assert f"rank {rank} did not answer within 0.05 minutes" in message


def test_every_group_waits_as_long_as_configured() -> None:
    assert run_ranks(2, timeouts_of_all_groups) == [{7.0}] * 2


def timeouts_of_all_groups() -> set[float]:
    """Seconds that the groups of this process wait, those of an engine and DeepSpeed's included."""
    from datetime import timedelta

    import torch
    from torch.distributed import distributed_c10d as c10d
    from toy import toy_engine

    from cluster.rank.preemption import Preemption
    from parallel.layout.topology import Topology
    from parallel.runtime import init_distributed
    from parallel.silence import limit_waiting

    init_distributed(device="cpu")
    toy_engine(Topology.build(tensor_parallel_size=2, zero_stage=1), 1)
    Preemption()
    limit_waiting(timedelta(seconds=7))
    groups = list(c10d._world.pg_map)
    assert len(groups) > 3
    cpu = torch.device("cpu")
    return {g._get_backend(cpu).options._timeout.total_seconds() for g in groups}


@pytest.mark.parametrize("weights", ["ema", pytest.param("both", marks=pytest.mark.slow)])
def test_a_signal_during_an_evaluation_is_obeyed_within_a_batch(
    pool: Path, tmp_path: Path, weights: str
):
    """The evaluation is made by the next start, and the run is that of one nobody disturbed."""
    more = ("objective=masked", "train.ema_decay=0.9", f"evaluation.weights={weights}")
    assert run_ranks(2, train_signalled_in_evaluation, pool, tmp_path / "a", *more) == [75, 75]
    status = json.loads((tmp_path / "a" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("preempted", 6)  # the first of two evaluations
    assert run_ranks(2, runs.train, pool, tmp_path / "a", *more) == [0, 0]
    assert run_ranks(2, runs.train, pool, tmp_path / "b", *more) == [0, 0]
    assert_same_run(tmp_path / "a", tmp_path / "b")


def train_signalled_in_evaluation(pool: Path, run: Path, *more: str) -> int:
    """The train loop, in which rank 1 gets SIGTERM after its first batch of an evaluation."""
    from pretrain import train
    from pretrain.training import session

    original, batches = session.evaluate_likelihood, []

    def evaluate(objective, stream, score, *arguments, **options):
        def counted(batch):
            batches.append(batch)
            if len(batches) == 1 and options["dp_rank"] == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            assert len(batches) <= 2 * 4, "the signal was not obeyed"
            return score(batch)

        return original(objective, stream, counted, *arguments, **options)

    session.evaluate_likelihood = evaluate
    return train.main(runs.overrides(pool, run, *more, "parallel.data_parallel_size=2"))
