"""A rank whose launcher has died."""

from __future__ import annotations

import os
import subprocess
import sys

from cluster.rank.orphan import LAUNCHER_PID

RANK = (
    "import signal, sys\n"
    "from cluster.rank import orphan\n"
    "orphan._POLL_SECONDS = 0.05\n"
    "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
    "orphan.end_with_launcher()\n"
    "print('watching', flush=True)\n"
    "signal.alarm(60)\n"
    "while True: signal.pause()\n"
)
LAUNCHER = (
    "import os, subprocess, sys\n"
    "os.environ['{variable}'] = {value}\n"
    "rank = subprocess.Popen([sys.executable, '-c', sys.argv[1]])\n"
    "print(rank.pid, flush=True)\n"
    "rank.wait()\n"
)


def launch(variable: str, value: str) -> tuple[subprocess.Popen[str], int]:
    """A launcher, and the process id of its rank, which watches."""
    code = LAUNCHER.format(variable=variable, value=value)
    launcher = subprocess.Popen(
        [sys.executable, "-c", code, RANK], stdout=subprocess.PIPE, text=True
    )
    assert launcher.stdout is not None
    pid = int(launcher.stdout.readline())
    assert launcher.stdout.readline() == "watching\n"
    return launcher, pid


def test_a_rank_ends_when_its_launcher_dies() -> None:
    launcher, _ = launch(LAUNCHER_PID, "str(os.getpid())")
    launcher.kill()  # stays a zombie until it is waited for
    assert launcher.stdout is not None
    # The end of the output is that of the rank, its last writer.
    assert launcher.stdout.read() == "the launcher has died; saving and stopping\n"
    launcher.wait()


def test_a_rank_whose_launcher_was_gone_before_it_watched() -> None:
    environment = {**os.environ, LAUNCHER_PID: "1"}
    done = subprocess.run(
        [sys.executable, "-c", RANK], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 75


def test_a_rank_that_nobody_launched_outlives_its_parent() -> None:
    """As one started by hand outlives its shell."""
    launcher, pid = launch("CROSS_RANK", "'0'")  # no launcher of DeepSpeed, for all it says
    launcher.kill()
    launcher.wait()
    assert launcher.stdout is not None
    os.kill(pid, 15)
    assert launcher.stdout.read() == ""
