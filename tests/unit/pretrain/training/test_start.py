"""The start of a run: what of a configuration decides how its ranks start, and what is kept."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import remote
from cluster.launch import Launch
from cluster.machine import cores
from cluster.outcome import Outcome
from pretrain.config.compose import compose, load_config
from pretrain.config.run import Config
from pretrain.training import compiler_cache, start
from pretrain.training.start import plan_run, write_run

DATA = ["data.train=train.json", "data.validation=val.json", "data.tokenizer=sp.model"]


def config(*overrides: str) -> Config:
    return compose(["model=tiny", *overrides, *DATA])


def test_ranks_read_the_saved_configuration(tmp_path: Path) -> None:
    plan = plan_run(config("run.device=cpu", f"run.dir={tmp_path}"), {})
    assert plan.command[1:] == [
        *("-u", "-m", "pretrain.train", "--config", str(tmp_path / "config.yaml"))
    ]


def test_threads_share_the_cores() -> None:
    two = "parallel.data_parallel_size=2"
    plan = plan_run(config("run.device=cpu", two), {})
    assert plan.job.ranks == 2
    assert int(plan.environment["OMP_NUM_THREADS"]) == max(1, cores() // 2)
    plan = plan_run(config("run.device=cpu"), {"OMP_NUM_THREADS": "3"})
    assert "OMP_NUM_THREADS" not in plan.environment
    plan = plan_run(config("parallel.threads_per_rank=5"), {"OMP_NUM_THREADS": "3"})
    assert plan.environment["OMP_NUM_THREADS"] == "5"


def test_ranks_on_gpus_are_said_to_be_there() -> None:
    assert plan_run(config("run.device=cuda"), {}).job.on_gpus
    assert not plan_run(config("run.device=cpu"), {}).job.on_gpus


def test_other_hosts_share_their_own_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_deepspeed", lambda: "deepspeed")
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    more = (f"parallel.hostfile={tmp_path}/hosts", "parallel.data_parallel_size=4")
    plan = plan_run(config("run.device=cpu", *more), {})
    assert plan.hosts == ("n1", "n2")
    assert plan.environment["DS_ACCELERATOR"] == "cpu"
    assert int(plan.environment["OMP_NUM_THREADS"]) == max(1, cores() // 2)


def test_earlier_configurations_of_a_run_are_kept(tmp_path: Path) -> None:
    first = compose(["model=tiny", f"run.root={tmp_path}", *DATA])
    for epochs in (1, 1, 2, 3):
        path = write_run(compose([f"data.epochs={epochs}"], write_run(first)))
        first = load_config(path)
    assert first.data.epochs == 3
    kept = [load_config(path.parent / f"config.{n}.yaml").data.epochs for n in (1, 2)]
    assert kept == [1, 2]
    assert len(list(path.parent.glob("config*.yaml"))) == 3


@pytest.mark.parametrize("repaired", [True, False])
def test_ranks_start_once_more_with_a_fresh_cache_where_torch_could_not_compile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repaired: bool
) -> None:
    """An empty object of a killed compilation makes every later one fail."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(compiler_cache.VARIABLE, raising=False)
    default = compiler_cache.default_cache()
    default.mkdir(parents=True)
    (default / "empty.so").touch()
    folders: list[Path | None] = []

    def launch(plan: Launch, output: object = None) -> Outcome:
        named = plan.environment.get(compiler_cache.VARIABLE)
        folders.append(Path(named) if named else None)
        if named is None or not repaired:
            message = "BackendCompilerFailed: backend='inductor' raised:\nCppCompileError: ..."
            return Outcome("failed", 0, message, 1)
        Path(named).mkdir()
        (Path(named) / "kernel.so").write_text("compiled")
        return Outcome("finished", 5, "", 0)

    monkeypatch.setattr(start, "launch", launch)
    outcome = start.run_ranks(config("run.device=cpu", f"run.dir={tmp_path / 'run'}"))
    assert len(folders) == 2
    assert folders[0] is None
    assert folders[1] != default
    assert outcome.state == ("finished" if repaired else "failed")
    assert [p.name for p in default.iterdir()] == ["kernel.so" if repaired else "empty.so"]


def test_statements_of_an_earlier_attempt_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text("{}")
    write_run(config(f"run.dir={tmp_path}"))
    assert not (tmp_path / "status.json").exists()
