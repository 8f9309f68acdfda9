"""Runs whose ranks are stand-ins, so that every way of ending can be played in a second or two."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

RANK = """
import json, os, signal, socket, subprocess, sys, time
from pathlib import Path
from cluster.rank import orphan
from cluster.status import write_first_failure, write_status
from cluster.folder import exclusive
run, rank = Path(sys.argv[1]), int(os.environ["RANK"])
folder = exclusive(run)
if rank == 0:
    folder.__enter__()
behaviour, *which = (run / "behaviour").read_text().split()
def end(state, code, message=""):
    if rank == 0:
        write_status(run, state, step=7, message=message, exit_code=code)
    sys.exit(code)
def on_term(number, frame):
    (run / f"signal-{rank}").write_text(signal.Signals(number).name)
    time.sleep(0.3)  # saving
    end("preempted", 75)
def meet():
    port = int(os.environ["MASTER_PORT"])
    if rank:
        with socket.create_connection((os.environ["MASTER_ADDR"], port)) as connection:
            connection.sendall(str(run).encode())
    else:
        listener = socket.socket(fileno=int(os.environ["MASTER_LISTEN_FD"]))
        with listener.accept()[0] as connection:
            (run / "met").write_text(connection.recv(1000).decode())
orphan._POLL_SECONDS = 0.05
orphan.end_with_launcher()
if behaviour != "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN if behaviour == "stubborn" else on_term)
nothing = subprocess.DEVNULL
child = subprocess.Popen(["sleep", "600"], stdout=nothing, stderr=nothing)
(run / f"child-{rank}").write_text(str(child.pid))
place = {k: v for k, v in os.environ.items() if k.startswith(("MASTER", "RANK", "LOCAL", "WORLD"))}
(run / f"place-{rank}").write_text(json.dumps(place))
(run / f"ready-{rank}").write_text(str(os.getpid()))
if behaviour == "meet":
    meet()
if behaviour in ("finish", "meet"):
    print(f"rank {rank} has finished", flush=True)
    end("finished", 0)
if behaviour == "silent":
    sys.exit(0)
while behaviour in ("die", "fail") and not (run / f"ready-{1 - rank}").exists():
    time.sleep(0.01)
if behaviour == "die" and rank == int(which[0]):
    os.kill(os.getpid(), getattr(signal, which[1]))
if behaviour == "fail" and rank == int(which[0]):
    error = ValueError("shard 3 is damaged")
    error.exit_code = 3
    write_first_failure(run, rank, error)
    sys.exit(3)
if behaviour == "fail" and which[1:] == ["lost"]:
    time.sleep(0.5)
    end("failed", 1, "RuntimeError: connection closed by peer")
time.sleep(600)
"""
PARENT = """
import json, os, signal, sys
from pathlib import Path
import cluster.local, cluster.remote
from cluster.folder import starting
from cluster.launch import Job, launch, plan_launch
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests run under nohup
cluster.local.GRACE_SECONDS = 1.0
cluster.local.LocalRanks.__init__.__kwdefaults__["grace_seconds"] = 1.0
cluster.remote._deepspeed = lambda: "launcher"
run, ranks, hostfile = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
job = Job("stand_in", [str(run)], run, ranks, hostfile=Path(hostfile[0]) if hostfile else None)
with starting(run):
    outcome = launch(plan_launch(job))
(run / "outcome").write_text(json.dumps(outcome.to_dict()))
sys.exit(outcome.exit_code)
"""
"""What `epochal train` does, without a configuration."""


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 120.0) -> None:
    """Poll until the condition holds; fails the test after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"timed out waiting for {what}"
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """True for a process that has not ended."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@dataclass
class Stage:
    """A run folder with stand-ins for ranks, started as `epochal train` starts its own."""

    folder: Path
    name: str = "run"
    started: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        """The run folder."""
        return self.folder / self.name

    def start(
        self, behaviour: str, *more: str, ranks: int = 2, **environment: str
    ) -> subprocess.Popen[str]:
        """The front process; `more` are its further arguments."""
        self.run.mkdir(exist_ok=True)
        for old in [*self.run.glob("ready-*"), *self.run.glob("*.json")]:
            old.unlink()
        (self.run / "behaviour").write_text(behaviour)
        path = f"{self.folder}:{os.environ.get('PYTHONPATH', '')}:{Path(__file__).parents[3]}"
        process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(self.run), str(ranks), *more],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self, process: subprocess.Popen[str]) -> tuple[int, str]:
        """Exit code and output of a front process, once it has ended."""
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    def outcome(self) -> dict[str, Any]:
        """The outcome that the front process has found."""
        found: dict[str, Any] = json.loads((self.run / "outcome").read_text())
        return found

    def place(self, rank: int) -> dict[str, str]:
        """Variables that gave a rank its place."""
        found: dict[str, str] = json.loads((self.run / f"place-{rank}").read_text())
        return found

    def pids(self, ranks: int = 2, kind: str = "ready") -> list[int]:
        """Process ids of all ranks, or of their children, once they have their handlers."""
        files = [self.run / f"{kind}-{rank}" for rank in range(ranks)]
        wait_for(lambda: all(f.exists() and f.read_text() for f in files), "the ranks")
        return [int(file.read_text()) for file in files]
