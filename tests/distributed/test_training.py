"""The whole run: the same curve in every layout, and after every death the run that had none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from comparison import assert_same_curve, assert_same_run
from harness import Died, run_ranks

from cluster.errors import EXIT_PREEMPTED
from pretrain.training.compilation import missing_compiler

OBJECTIVES = ["autoregressive", "masked"]


LAYOUTS = [
    (1, ["parallel.zero_stage=1"]),
    (1, ["parallel.zero_stage=2", "train.micro_batch_size=2"]),
    (2, ["parallel.zero_stage=0"]),
    (2, ["parallel.zero_stage=1"]),
    (2, ["parallel.zero_stage=2", "train.micro_batch_size=1"]),
    (2, ["parallel.zero_stage=0", "parallel.tensor_parallel_size=2"]),
    (2, ["parallel.zero_stage=1", "parallel.tensor_parallel_size=2"]),
    (4, ["parallel.zero_stage=1", "parallel.tensor_parallel_size=2"]),
]
DEATHS = [
    [(3, "before")],
    [(8, "saving")],
    [(5, "after"), (11, "before")],
    [(8, "after"), (12, "saving")],
]


def in_turn(cases: list[Any], names: list[str]) -> list[Any]:
    """(case, objective): one objective each in turn, in the slow suite also the other."""
    return [
        pytest.param(
            case,
            objective,
            marks=[] if number % len(OBJECTIVES) == turn else [pytest.mark.slow],
            id=f"{objective}-{names[number]}",
        )
        for number, case in enumerate(cases)
        for turn, objective in enumerate(OBJECTIVES)
    ]


NAMES = ["-".join([str(ranks), *(v.split(".")[-1] for v in more)]) for ranks, more in LAYOUTS]


@pytest.mark.parametrize(("layout", "objective"), in_turn(LAYOUTS, NAMES))
def test_every_layout_gives_the_one_rank_curve(
    pool: Path, tmp_path: Path, undisturbed, layout: tuple[int, list[str]], objective: str
):
    ranks, settings = layout
    more = (f"objective={objective}", *settings)
    assert run_ranks(ranks, runs.train, pool, tmp_path, *more) == [0] * ranks
    assert_same_curve(tmp_path, undisturbed(f"objective={objective}"))


@pytest.mark.parametrize(("deaths", "objective"), in_turn(DEATHS, [*map(str, DEATHS)]))
def test_a_killed_and_resumed_run_is_bitwise_the_undisturbed_one(
    pool: Path, tmp_path: Path, undisturbed, deaths: list[tuple[int, str]], objective: str
):
    more = (f"objective={objective}", "parallel.zero_stage=0")
    for step, when in deaths:
        died = run_ranks(
            1,
            runs.train,
            pool,
            tmp_path,
            *more,
            launcher=False,
            may_die=True,
            kill_at=step,
            when=when,
        )
        assert died == [Died(-9)]
    assert run_ranks(1, runs.train, pool, tmp_path, *more, launcher=False) == [0]
    assert_same_run(tmp_path, undisturbed(f"objective={objective}"))


def test_a_finished_run_that_is_started_again_stays_as_it_is(
    pool: Path, tmp_path: Path, undisturbed
):
    more = ("objective=masked", "parallel.zero_stage=0")
    shutil.copytree(undisturbed(more[0]), tmp_path / "run")
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert run_ranks(1, runs.train, pool, tmp_path / "run", *more, launcher=False) == [0]
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == log
    assert_same_run(tmp_path / "run", undisturbed(more[0]))


def test_an_evaluation_on_the_step_of_a_signal_is_made_by_the_next_start(
    pool: Path, tmp_path: Path, undisturbed
):
    """On the way, at the end, and with an objective whose training depends on what it measures."""
    cases = {
        "masked": (("objective=masked",), (6, runs.STEPS)),
        "adapting": (runs.ADAPTING, (6,)),
    }
    for name, (chosen, steps) in cases.items():
        more, run = (*chosen, "parallel.zero_stage=0"), tmp_path / name
        for step in steps:
            code = run_ranks(1, runs.train, pool, run, *more, launcher=False, signal_at=step)
            assert code == [EXIT_PREEMPTED]
            assert "validation/nats_per_token" not in runs.log(run)[step]
        assert run_ranks(1, runs.train, pool, run, *more, launcher=False) == [0]
        assert_same_run(run, undisturbed(*chosen))


def test_a_larger_batch_after_a_resume_does_not_fall_back_into_the_warm_up(
    pool: Path, tmp_path: Path
):
    """Six steps of 4 sequences are 24, also when the steps become four times as large."""
    more = ("optimizer.schedule.name=constant", "optimizer.schedule.warmup=6")
    before = ("train.global_batch_size=4", "train.stop_step=7")
    after = ("train.global_batch_size=16", "train.stop_step=9")
    for chosen in (before, after, (*after[:1], "train.stop_step=10", "data.epochs=5")):
        assert run_ranks(1, runs.train, pool, tmp_path, *more, *chosen, launcher=False) == [0]
    rates = [runs.log(tmp_path)[step]["train/lr"] for step in range(1, 11)]
    assert rates == pytest.approx([5e-3 * min(1.0, 4 * step / 24) for step in range(1, 11)])


@pytest.mark.parametrize(
    "objective", ["masked", pytest.param("autoregressive", marks=pytest.mark.slow)]
)
def test_a_run_resumed_on_two_ranks_goes_on_as_on_one(
    pool: Path, tmp_path: Path, undisturbed, objective: str
):
    """What was saved on one rank is restored bitwise on two, and the curve is the same."""
    more = (
        f"objective={objective}",
        "parallel.zero_stage=0",
        "train.async_checkpoint=false",  # that of step 8 must be there at step 9
    )
    run_ranks(
        1, runs.train, pool, tmp_path, *more, launcher=False, may_die=True, kill_at=9, when="before"
    )
    restored = run_ranks(2, restore, pool, tmp_path, f"objective={objective}")
    saved = runs.checkpoint(tmp_path, 8)
    state = saved.pop("state")
    for rank in restored:
        assert rank["state"] == state
        assert set(rank["tensors"]) == set(saved)
        for name, tensor in saved.items():
            assert torch.equal(rank["tensors"][name], tensor), name
    # Noise and tokens of the next batch: the two halves together are the one-rank batch.
    alone = run_ranks(1, restore, pool, tmp_path, f"objective={objective}", launcher=False)[0]
    halves = torch.cat([rank["ids"] for rank in restored])
    assert torch.equal(halves, alone["ids"])
    assert run_ranks(2, runs.train, pool, tmp_path, f"objective={objective}") == [0, 0]
    assert_same_curve(tmp_path, undisturbed(f"objective={objective}"))


@pytest.mark.slow
@pytest.mark.skipif(missing_compiler() is not None, reason=str(missing_compiler()))
def test_a_compiled_run_goes_on_without_compiling(pool: Path, tmp_path: Path, undisturbed) -> None:
    """Its checkpoint is one like any other, and both halves give the curve of eager layers."""
    more = ["objective=masked", "parallel.zero_stage=0", "train.compile=true"]
    run_ranks(
        1, runs.train, pool, tmp_path, *more, launcher=False, may_die=True, kill_at=9, when="before"
    )
    assert run_ranks(1, runs.train, pool, tmp_path, *more[:2], launcher=False) == [0]
    assert_same_curve(tmp_path, undisturbed("objective=masked"))


def restore(pool: Path, run: Path, *more: str) -> dict:
    """What this rank has after loading: whole tensors, state, and its next corrupted batch."""
    from parallel.runtime import init_distributed
    from pretrain.config.compose import compose
    from pretrain.config.run import resolve
    from pretrain.data import clean_batch
    from pretrain.training.session import open_session

    runtime = init_distributed(1)
    session = open_session(resolve(compose(runs.overrides(pool, run, *more))), runtime)
    engine = session.engine
    tensors = {}
    for name in engine.parameters:
        tensors[name] = engine.read(name, "weight")
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}/{name}"] = engine.read(name, moment)
    with session.loader() as loader:
        clean = clean_batch(next(iter(loader)).micro_batches[0])
    batch = session.objective.corrupt(clean, session.noise(clean.position))
    from data_pipeline.stream.cursor import Cursor

    cursor = Cursor.at(session.train_stream, session.state.position).to_dict()
    state = {"train": session.state.to_dict(), "cursor": cursor}
    return {"tensors": tensors, "state": state, "ids": batch.ids}


def train_sharded(pool: Path, run: Path, *more: str) -> int:
    """The train loop with every weight sharded, however small, and freed after each use."""
    from dataclasses import replace

    from parallel.engine import single_stage
    from pretrain import train
    from pretrain.training import session

    settings, deepspeed = session.engine_config, single_stage.deepspeed_config

    def freeing(*given):
        values = deepspeed(*given)
        values["zero_optimization"] |= {
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
        }
        return values

    session.engine_config = lambda *given: replace(settings(*given), whole_below=0)
    single_stage.deepspeed_config = freeing
    return train.main(runs.overrides(pool, run, *more))


def test_evaluation_of_sharded_weights_with_batches_that_ranks_do_not_share_evenly(
    pool: Path, tmp_path: Path
):
    """Three batches on two ranks: gathering a weight needs both of them in every forward pass."""
    more = ["objective=masked", "train.stop_step=6", "evaluation.sequences=24"]
    sharded = [*more, "parallel.data_parallel_size=2", "parallel.zero_stage=3"]
    assert run_ranks(2, train_sharded, pool, tmp_path / "two", *sharded) == [0, 0]
    assert run_ranks(1, runs.train, pool, tmp_path / "one", *more) == [0]
    two, one = ({**runs.log(tmp_path / name)[6]} for name in ("two", "one"))
    for key in ("validation/nats_per_token", "validation/standard_error", "train/loss"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key
