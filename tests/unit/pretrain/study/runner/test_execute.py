"""Execution of a study, with an executor that trains nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import ClusterError, FolderInUseError
from cluster.outcome import Outcome
from cluster.status import write_status
from pretrain.study.runner import execute as module
from pretrain.study.runner.display import LogDisplay
from pretrain.study.runner.execute import execute, holding
from pretrain.study.runner.planned import Planned, plan_runs
from pretrain.study.runner.settings import Study

FINISHED = Outcome("finished", 4, "", 0)
FAILED = Outcome("failed", 2, "TrainingError: loss nan", 5)
PREEMPTED = Outcome("preempted", 2, "", 75)


class FakeExecutor:
    """Room for two runs; each ends at the next poll, or when it is stopped."""

    def __init__(self, ends: dict[str, Outcome] | None = None, endless: bool = False) -> None:
        self.ends, self.endless = ends or {}, endless
        self.active: list[str] = []
        self.started: list[str] = []
        self.most, self.kills, self.stops = 0, 0, 0
        self.refuse: dict[str, list[ClusterError]] = {}

    def submit(self, run: Planned) -> bool:
        if len(self.active) == 2:
            return False
        if self.refuse.get(run.name):
            raise self.refuse[run.name].pop(0)
        self.active.append(run.name)
        self.started.append(run.name)
        self.most = max(self.most, len(self.active))
        return True

    def poll(self) -> dict[str, Outcome]:
        if self.endless and not self.stops:
            os.kill(os.getpid(), signal.SIGTERM)
            return {}
        ended, self.active = self.active, []
        return {n: PREEMPTED if self.endless else self.ends.get(n, FINISHED) for n in ended}

    def stop(self) -> None:
        self.stops += 1

    def kill(self) -> None:
        self.kills += 1


@pytest.fixture
def runs(small: Callable[..., Study], tmp_path: Path) -> list[Planned]:
    return plan_runs(small(grid={"run.seed": [1, 2, 3]}, base=("data.epochs=1",)), tmp_path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_POLL_SECONDS", 0.0)
    monkeypatch.setattr(module, "_BUSY_SECONDS", 0.01)


def test_all_runs_are_executed_as_many_at_once_as_there_is_room(runs: list[Planned]) -> None:
    executor = FakeExecutor()
    summary = execute(runs, executor, LogDisplay(runs))
    assert executor.started == summary.done == ["seed=1", "seed=2", "seed=3"]
    assert executor.most == 2
    assert (summary.exit_code, summary.failed, summary.left) == (0, {}, [])


def test_what_is_done_is_skipped(runs: list[Planned]) -> None:
    for run, state in zip(runs, ("finished", "preempted", "failed"), strict=True):
        run.folder.mkdir(parents=True)
        write_status(run.folder, state, step=4, exit_code=0)  # type: ignore[arg-type]
    executor = FakeExecutor()
    summary = execute(runs, executor, LogDisplay(runs))
    assert executor.started == ["seed=2", "seed=3"]
    assert sorted(summary.done) == ["seed=1", "seed=2", "seed=3"]


def test_a_run_that_fails_does_not_stop_the_others(runs: list[Planned]) -> None:
    executor = FakeExecutor({"seed=2": FAILED})
    executor.refuse["seed=1"] = [ClusterError("no GPU")]
    summary = execute(runs, executor, LogDisplay(runs))
    assert summary.done == ["seed=3"]
    assert summary.failed == {"seed=1": "no GPU", "seed=2": "TrainingError: loss nan"}
    assert summary.exit_code == 5


def test_a_folder_that_somebody_else_holds_is_waited_for(runs: list[Planned]) -> None:
    executor = FakeExecutor()
    executor.refuse["seed=1"] = [FolderInUseError("in use; wait"), FolderInUseError("in use")]
    summary = execute(runs, executor, LogDisplay(runs))
    assert sorted(summary.done) == ["seed=1", "seed=2", "seed=3"]
    assert executor.started[-1] == "seed=1"


def test_a_signal_stops_what_runs_and_starts_no_more(runs: list[Planned]) -> None:
    executor = FakeExecutor(endless=True)
    summary = execute(runs, executor, LogDisplay(runs))
    assert executor.stops == 1
    assert executor.started == ["seed=1", "seed=2"]
    assert sorted(summary.left) == ["seed=1", "seed=2", "seed=3"]
    assert summary.exit_code == 75
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_one_process_at_a_time_executes_a_study(tmp_path: Path) -> None:
    in_use = pytest.raises(ClusterError, match="is in use by process")
    with holding(tmp_path), in_use, holding(tmp_path):
        pass
