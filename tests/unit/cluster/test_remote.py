"""Ranks on several machines, played on this one with stand-ins for DeepSpeed and pdsh."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from stage import Stage, is_running, wait_for

from cluster import remote
from cluster.errors import LaunchError
from cluster.launch import Job, plan_launch
from cluster.remote import rank_pattern, write_environment_file

LAUNCHER = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index("--module") + 1 :]
environment = {{k: v for k, v in os.environ.items() if k != "EPOCHAL_LAUNCHER_PID"}}
ranks = [
    subprocess.Popen(
        [sys.executable, "-u", "-m", *command], env={{**environment, "RANK": str(rank)}},
        start_new_session=True,
    )
    for rank in range(2)
]
sys.exit(max(rank.wait() % 256 for rank in ranks))
"""
PDSH = """#!/bin/sh
while [ $# -gt 1 ]; do shift; done
exec sh -c "$1"
"""


@pytest.fixture
def hosts(stage: Stage) -> list[str]:
    """Arguments of a start on two machines; the programs that reach them are first in PATH."""
    programs = {"launcher": LAUNCHER.format(python=sys.executable), "pdsh": PDSH}
    for name, text in programs.items():
        (stage.folder / name).write_text(text)
        (stage.folder / name).chmod(0o755)
    (stage.folder / "hosts").write_text("n1 slots=1\nn2 slots=1\n")
    return [str(stage.folder / "hosts")]


def start(stage: Stage, behaviour: str, hosts: list[str]) -> subprocess.Popen[str]:
    """The front process of ranks on `hosts`."""
    return stage.start(behaviour, *hosts, PATH=f"{stage.folder}:{os.environ['PATH']}")


def test_a_finished_run(stage: Stage, hosts: list[str]) -> None:
    code, out = stage.end(start(stage, "finish", hosts))
    assert code == 0, out
    assert "launcher --hostfile" in out
    assert (stage.run / "deepspeed_env").is_file()


def test_a_signal_reaches_the_ranks_and_never_the_launcher(stage: Stage, hosts: list[str]) -> None:
    front = start(stage, "train", hosts)
    pids = stage.pids()
    front.terminate()
    code, out = stage.end(front)
    assert code == 75, out
    assert [(stage.run / f"signal-{r}").read_text() for r in range(2)] == ["SIGTERM", "SIGTERM"]
    assert not any(map(is_running, pids))


def test_a_second_signal_kills_the_ranks_on_every_host(stage: Stage, hosts: list[str]) -> None:
    front = start(stage, "stubborn", hosts)
    pids = stage.pids()
    front.send_signal(signal.SIGINT)
    asked = "SIGINT: the ranks save and stop"
    assert front.stdout is not None
    assert any(line.startswith(asked) for line in front.stdout)
    assert all(map(is_running, pids))
    front.send_signal(signal.SIGINT)
    assert stage.end(front)[0] == LaunchError.exit_code
    wait_for(lambda: not any(map(is_running, pids)), "the ranks' end")


def test_a_killed_rank_is_known_by_the_launchers_code(stage: Stage, hosts: list[str]) -> None:
    front = start(stage, "die 1 SIGKILL", hosts)
    os.kill(stage.pids()[0], signal.SIGTERM)  # what DeepSpeed does to the others
    assert stage.end(front)[0] in (75, LaunchError.exit_code)


def test_the_pattern_matches_ranks_and_not_the_command_that_looks_for_them() -> None:
    pattern = rank_pattern(["-u", "-m", "pretrain.train", "--config", "/runs/a+b (1)/config.yaml"])
    assert pattern == r"-[u] -m pretrain\.train --config /runs/a\+b \(1\)/config\.yaml$"


def test_only_the_ranks_of_this_run_are_signalled() -> None:
    """By a real pkill in a real shell, as pdsh starts it on every host."""
    names = ["v1.0", "v1_0", "v1.0/old", "old/v1.0", "a+b (1)", "aab (1)", "a'b", "a$b", "x|y", "x"]
    names += ["v[1]", "v1", "a\\b", "ab", "h{2}", "hh", "v1.0/c.yaml"]
    wait = "import time; time.sleep(60)"
    ranks = {
        name: subprocess.Popen([sys.executable, "-Sc", wait, "--config", f"/runs/{name}/c.yaml"])
        for name in names
    }
    try:
        while ranks:
            name, ours = ranks.popitem()
            pattern = shlex.quote(rank_pattern(["-Sc", wait, "--config", f"/runs/{name}/c.yaml"]))
            subprocess.run(["sh", "-c", f"pkill -KILL -f -- {pattern}"], check=True)
            assert ours.wait(10) == -signal.SIGKILL
            assert {other: rank.poll() for other, rank in ranks.items()} == dict.fromkeys(ranks)
    finally:
        for rank in ranks.values():
            rank.kill()
            rank.wait()


def test_hosts_get_a_keep_alive_and_an_environment_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "_deepspeed", lambda: "deepspeed")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    job = Job("m", ["x"], tmp_path, 4, {"DS_ACCELERATOR": "cpu"}, hostfile=tmp_path / "hosts")
    plan = plan_launch(job, {"PDSH_SSH_ARGS_APPEND": "-v"})
    assert plan.hosts == ("n1", "n2")
    assert plan.command[-3:] == ["--module", "m", "x"]
    assert "--no_local_rank" in plan.command
    assert plan.environment["PDSH_SSH_ARGS_APPEND"].startswith("-v -o ServerAliveInterval")
    assert plan.environment["DS_ENV_FILE"] == str(tmp_path / "deepspeed_env")
    (tmp_path / ".deepspeed_env").write_text("HERE=1\nnothing\n")
    write_environment_file({**plan.environment, "NCCL_DEBUG": "INFO", "X": "1"}, tmp_path / "env")
    lines = (tmp_path / "env").read_text().splitlines()
    assert {"HERE=1", "DS_ACCELERATOR=cpu", "NCCL_DEBUG=INFO"} <= set(lines)
    assert "X=1" not in lines
    assert all("=" in line for line in lines)


def test_a_hostfile_of_this_machine_alone_needs_no_launcher(tmp_path: Path) -> None:
    """DeepSpeed would want ssh to this very machine."""
    (tmp_path / "hosts").write_text("localhost slots=2\n")
    plan = plan_launch(Job("m", [], tmp_path, 2, hostfile=tmp_path / "hosts"), {})
    assert plan.hosts == ()
    assert plan.command == [sys.executable, "-u", "-m", "m"]
