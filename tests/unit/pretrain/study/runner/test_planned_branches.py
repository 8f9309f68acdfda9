"""A study with `branches`: trunk and branches are planned, wait for each other, and are counted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.outcome import Outcome
from pretrain.cli.study_plan import _share
from pretrain.errors import ConfigError
from pretrain.study.runner.budget import costs_of
from pretrain.study.runner.collect import collect
from pretrain.study.runner.display import LogDisplay
from pretrain.study.runner.execute import execute
from pretrain.study.runner.planned import Planned, plan_runs, select
from pretrain.study.runner.record import write_record
from pretrain.study.runner.settings import Study

BASE = ("data.unique_tokens=3200", "optimizer.schedule.warmup=2")
LENGTHS = {"epochs": [1, 2, 4], "decay": 0.2}


class Executor:
    """Executor whose trunks leave their checkpoints when they end."""

    def __init__(self, planned: list[Planned], works: bool = True) -> None:
        self.planned, self.works = planned, works
        self.started: list[str] = []
        self.active: list[Planned] = []

    def submit(self, run: Planned) -> bool:
        self.started.append(run.name)
        self.active.append(run)
        return True

    def poll(self) -> dict[str, Outcome]:
        ended, self.active = self.active, []
        for run in ended:
            for other in self.planned if run.facts.trunk and self.works else ():
                if other.origin is not None and other.origin.is_relative_to(run.folder):
                    other.origin.mkdir(parents=True)
                    (other.origin / "manifest.json").touch()
        outcome = Outcome("finished", 4, "", 0) if self.works else Outcome("failed", 2, "nan", 5)
        return {run.name: outcome for run in ended}

    def stop(self) -> None: ...

    def kill(self) -> None: ...


@pytest.fixture
def planned(small: Callable[..., Study], tmp_path: Path) -> list[Planned]:
    """100 sequences an epoch in steps of 8, two seeds."""
    return plan_runs(small(BASE, grid={"run.seed": [1, 2]}, branches=LENGTHS), tmp_path)


def test_each_cell_has_a_trunk_and_a_branch_for_each_length(planned: list[Planned]) -> None:
    names = ["trunk", "e1", "e2", "e4"]
    assert [run.name for run in planned] == [f"seed={s},{n}" for s in (1, 2) for n in names]
    trunk, *branches = planned[:4]
    assert trunk.config.optimizer.schedule.name == "constant"
    assert trunk.facts.trunk
    for run, step, epochs in zip(branches, (10, 20, 40), (1, 2, 4), strict=True):
        assert run.config.run.branch_from == run.origin
        assert run.origin == trunk.folder / "checkpoints" / f"step-{step:08d}"
        assert run.facts.axes["data.epochs"] == run.facts.planned_epochs == epochs
        assert run.config.run.seed == 1
        assert not run.is_ready


def test_the_plan_states_the_share_of_separate_runs(planned: list[Planned]) -> None:
    """320 sequences of trunk and 20 + 40 + 80 of decays, instead of 700."""
    assert _share(costs_of(planned)) == pytest.approx(460 / 700)


def test_branches_wait_for_their_trunk(planned: list[Planned]) -> None:
    executor = Executor(planned)
    assert execute(planned, executor, LogDisplay(planned)).exit_code == 0
    assert [name.partition(",")[2] for name in executor.started[:2]] == ["trunk", "trunk"]
    assert sorted(executor.started) == sorted(run.name for run in planned)


def test_branches_of_a_trunk_that_failed_or_was_left_out_are_not_waited_for(
    planned: list[Planned],
) -> None:
    for chosen in (planned, select(planned, "e4")):
        summary = execute(chosen, Executor(planned, works=False), LogDisplay(chosen))
        assert len(summary.failed) == len(chosen)
        assert "execute the trunk first" in summary.failed["seed=2,e4"]


def test_a_trunk_is_no_row_of_the_table(
    small: Callable[..., Study], planned: list[Planned], tmp_path: Path
) -> None:
    write_record(tmp_path, small(BASE, grid={"run.seed": [1, 2]}, branches=LENGTHS), planned)
    for run in planned:
        run.folder.mkdir(parents=True)
        (run.folder / "metrics.jsonl").write_text(
            '{"step": 99, "train/tokens": 1, "train/flops": 1, "validation/nats_per_token": 3}\n'
        )
    table = collect(tmp_path)
    assert sorted(table["run"]) == [run.name for run in planned if not run.facts.trunk]
    assert set(table["data.epochs"]) == {1.0, 2.0, 4.0}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"grid": {"data.epochs": [1]}}, "data.epochs follows from branches"),
        ({"stopping": {"patience": 3}}, "its lengths are whole"),
        ({"flops": [1e9]}, "its lengths are whole"),
    ],
)
def test_a_second_statement_of_lengths_is_refused(
    small: Callable[..., Study], more: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        small(BASE, branches=LENGTHS, **more)


def test_a_recipe_may_have_lengths_of_its_own(small: Callable[..., Study], tmp_path: Path) -> None:
    study = small(
        BASE,
        branches=LENGTHS,
        arms={
            "a": {"set": ["optimizer.lr=1e-3"]},
            "b": {"set": ["optimizer.lr=2e-3"], "branches": {"epochs": [3], "decay": 0.5}},
            "c": {"like": "b", "set": ["optimizer.weight_decay=1"]},
        },
    )
    found = [(run.name[0], run.config.data.epochs) for run in plan_runs(study, tmp_path)]
    ends = {arm: [e for name, e in found if name == arm] for arm in "abc"}
    assert ends == {"a": [3.2, 1, 2, 4], "b": [1.44, 3], "c": [1.44, 3]}  # trunks first
