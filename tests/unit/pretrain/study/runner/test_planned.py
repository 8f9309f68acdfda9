"""Runs of a study, checked and counted before anything starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.status import write_status
from parallel.planner.plan import estimate
from pretrain.config.compose import save_config
from pretrain.errors import ConfigError
from pretrain.planning.cost import model_cost
from pretrain.planning.machines import load_machine, sized
from pretrain.planning.plan import given_candidate, objective_cost
from pretrain.study.runner.budget import costs_of, data_needed
from pretrain.study.runner.memory import _PROCESS_BYTES, host_bytes
from pretrain.study.runner.planned import counted_flops_per_token, plan_runs, select
from pretrain.study.runner.record import read_record, removed_runs, write_record
from pretrain.study.runner.settings import Study

Make = Callable[..., Study]


def test_every_run_is_counted(small: Make, tmp_path: Path) -> None:
    (run,) = plan_runs(small(grid={"data.unique_tokens": [1000], "data.epochs": [2.5]}), tmp_path)
    facts = run.facts
    assert run.folder == tmp_path / "runs" / "unique_tokens=1000,epochs=2.5"
    assert facts.axes == {"data.unique_tokens": 1000, "data.epochs": 2.5}
    assert facts.params == 16464  # as the trained model has
    assert facts.params - facts.params_non_embedding == 512 * 16
    assert (facts.unique_tokens, facts.planned_epochs) == (1000, 2.5)
    assert facts.total_steps == facts.last_step == 10  # 32 sequences, 2.5 times, by 8
    assert facts.tokens == 2500
    assert run.config.objective.time_window == 8  # filled in as by a start


def test_a_budget_of_flops_becomes_epochs(small: Make, tmp_path: Path) -> None:
    grid = {"data.unique_tokens": [1000, 4000]}
    flops = 6.0 * 16464 * 8000
    runs = plan_runs(small(grid=grid, flops=[flops, str(2 * flops)]), tmp_path)
    assert [run.facts.planned_epochs for run in runs] == pytest.approx([8, 16, 2, 4], rel=1e-5)
    assert [run.facts.flops_6nd for run in runs] == pytest.approx([flops, 2 * flops] * 2, rel=1e-5)
    assert [run.facts.axes["flops"] for run in runs] == [flops, 2 * flops] * 2

    counted = small(grid=grid, flops=[flops], flops_convention="counted")
    run = plan_runs(counted, tmp_path)[0]
    total = counted_flops_per_token(run.config) * run.facts.tokens
    assert total == pytest.approx(flops, rel=1e-5)


def test_shared_limits_end_runs_and_leave_their_schedules(small: Make, tmp_path: Path) -> None:
    rules: dict[str, Any] = {"patience": 3, "min_delta": 0.01, "max_tokens": 2000}
    axes = {"data.unique_tokens": [1024], "data.epochs": [1, 8]}
    short, long = plan_runs(small(stopping=rules, grid=axes), tmp_path)
    assert (long.config.train.patience, long.config.train.min_delta) == (3, 0.01)
    assert long.config.train.stop_step == long.facts.last_step == 7  # of 256 tokens each
    assert long.facts.total_steps == 32
    assert long.facts.tokens == 7 * 256
    assert short.facts.last_step == short.facts.total_steps == 4

    rules = {"max_tokens": 1e9, "max_flops": 6.0 * 16464 * 256 * 5.5}
    assert plan_runs(small(stopping=rules, grid=axes), tmp_path)[1].facts.last_step == 5


def test_every_problem_is_said_once_with_the_runs_that_have_it(small: Make, tmp_path: Path) -> None:
    grid = {"data.unique_tokens": [1000, 10**9], "model.num_attention_heads": [2, 3]}
    with pytest.raises(ConfigError) as error:
        plan_runs(small(grid=grid), tmp_path)
    lines = str(error.value).splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("unique_tokens=1000,num_attention_heads=3 and 1 more run: ")
    assert lines[1].startswith("unique_tokens=1000000000,num_attention_heads=2: ")
    assert not (tmp_path / "runs").exists()


def test_a_study_may_grow_but_not_change_what_was_begun(small: Make, tmp_path: Path) -> None:
    grid = {"data.unique_tokens": [1000, 2000]}
    first, second = plan_runs(small(grid=grid), tmp_path)
    write_record(tmp_path, small(grid=grid), [first, second])
    for run in (first, second):
        save_config(run.config, run.folder / "config.yaml")
    write_status(first.folder, "finished", step=4, exit_code=0)
    write_status(second.folder, "failed", step=0, exit_code=1)

    more = plan_runs(small(grid={"data.unique_tokens": [1000, 3000]}), tmp_path)
    assert [run.facts.unique_tokens for run in more] == [1000, 3000]
    assert removed_runs(tmp_path, more) == [second.name]

    plan_runs(small(grid=grid, base=("train.checkpoint_interval=2",)), tmp_path)
    with pytest.raises(ConfigError) as error:
        plan_runs(small(grid=grid, base=("data.epochs=3", "optimizer.lr=0.1")), tmp_path)
    said = str(error.value)
    assert said.startswith(f"{first.name}: the run was begun with another configuration:")
    assert "data.epochs: the run has 1.0, given 3.0" in said
    assert "optimizer.lr: the run has 0.0003, given 0.1" in said
    assert second.name not in said  # it has neither ended nor saved anything


def test_the_record_of_a_study_is_read_as_it_was_written(small: Make, tmp_path: Path) -> None:
    study = small(grid={"run.seed": [1, 2]}, base=("data.unique_tokens=1000",))
    runs = plan_runs(study, tmp_path)
    write_record(tmp_path, study, runs)
    assert read_record(tmp_path).runs == tuple(run.facts for run in runs)
    assert plan_runs(Study.model_validate(study.model_dump()), tmp_path) == runs
    with pytest.raises(ConfigError, match="is not the folder of a study"):
        read_record(tmp_path / "runs")
    (tmp_path / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot read"):
        read_record(tmp_path)


def test_runs_are_chosen_by_a_part_of_their_name_or_a_pattern(small: Make, tmp_path: Path) -> None:
    grid = {"run.seed": [1, 12], "data.unique_tokens": [1000]}
    runs = plan_runs(small(grid=grid), tmp_path)
    assert select(runs, None) == runs
    assert select(runs, "seed=1") == runs
    assert select(runs, "seed=1,*") == runs[:1]
    with pytest.raises(ConfigError, match="fits no run"):
        select(runs, "seed=3")


def test_costs_are_those_of_planner_and_given_speed(small: Make, tmp_path: Path) -> None:
    runs = plan_runs(small(grid={"data.unique_tokens": [1000, 2000]}), tmp_path)
    costs = costs_of(runs, "h100x8", flops_per_second=1e6)
    for cost, run in zip(costs, runs, strict=True):
        assert cost.flops == counted_flops_per_token(run.config) * run.facts.tokens
        assert cost.hours == pytest.approx(cost.flops / 1e6 / 3600)
    assert costs[1].gpu_hours == pytest.approx(2 * (costs[0].gpu_hours or 0.0))
    (data,) = data_needed(runs)
    assert (data.unique_tokens, data.validation_sequences) == (2000, 16)


def test_the_estimate_of_host_memory_is_near_that_of_the_planner(
    small: Make, tmp_path: Path
) -> None:
    """It decides how many runs train at once, and need not import torch for that."""
    grid: dict[str, Any] = {
        "objective": ["autoregressive", "masked", "block"],
        "model.hidden_size": [128, 512],
        "model.num_attention_heads": [4],
        "data.seq_length": [128, 512],
        "train.global_batch_size": [32],
    }
    machine = sized(load_machine("h100x8"), 1)
    for run in plan_runs(small(grid=grid, base=("data.unique_tokens=1000",)), tmp_path):
        config = run.config
        vocabulary = 512
        objective = objective_cost(config, vocabulary, on_gpu=False)
        model = model_cost(config, config.model.padded_vocab_size(vocabulary), objective)
        planned = estimate(model, given_candidate(config, model, 1), machine).memory.total
        ratio = (host_bytes(run) - _PROCESS_BYTES) / planned
        assert 0.9 < ratio < 1.7, (run.name, ratio)


def test_the_front_of_a_study_never_imports_torch(pool: Path, tmp_path: Path) -> None:
    files = [
        f"data.train={pool / 'train' / 'manifest.json'}",
        f"data.validation={pool / 'validation' / 'manifest.json'}",
        f"data.tokenizer={pool / 'tokenizer.model'}",
    ]
    script = f"""
import sys
from pretrain.cli.study import load
from pretrain.cli.study_run import run_study
study, _ = load("smoke", {files!r}, None)
import pretrain.study.runner.execute
run_study(study, __import__("pathlib").Path({str(tmp_path)!r}), 1, None, dry_run=True, as_json=True)
heavy = {{"torch", "pandas", "mlflow", "scipy"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
