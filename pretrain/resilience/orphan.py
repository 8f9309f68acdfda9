"""A rank whose launcher has died saves and ends, instead of holding its GPU for ever.

DeepSpeed's launcher leaves its ranks running when it is killed. Polling is used because a parent's
death signal (PR_SET_PDEATHSIG) exists only on Linux and only for the direct parent, while
`epochal train` is two processes further up.
"""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil

from pretrain.launch import LAUNCHER_PID

_POLL_SECONDS = 1.0
_GRACE_SECONDS = 900.0
"""Time to save after the launcher's death; then the rank is killed."""


def end_with_launcher() -> None:
    """From now on treat the death of this rank's launchers as a SIGTERM; returns at once.

    Watched are `epochal train`, when it started this rank on this machine, and DeepSpeed's
    launcher. A rank started by hand has neither and may outlive its shell.
    """
    watched: list[psutil.Process | None] = []
    above = os.environ.get(LAUNCHER_PID)
    for pid in ([int(above)] if above else []) + ([os.getppid()] if _launched() else []):
        try:
            watched.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            watched.append(None)
    if watched:
        threading.Thread(target=_watch, args=(watched,), name="orphan", daemon=True).start()


def _launched() -> bool:
    """Whether the parent is DeepSpeed's launcher on this host, or was until it died."""
    if "CROSS_RANK" not in os.environ:  # set by deepspeed.launcher.launch alone
        return False
    try:
        parent = psutil.Process(os.getppid())
        return parent.pid == 1 or "deepspeed.launcher.launch" in parent.cmdline()
    except psutil.Error:
        return True


def _watch(watched: list[psutil.Process | None]) -> None:
    while all(_alive(process) for process in watched):
        time.sleep(_POLL_SECONDS)
    print("the launcher has died; saving and stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


def _alive(process: psutil.Process | None) -> bool:
    """Whether a process is there; None stands for one that was gone already."""
    try:
        if process is None or not process.is_running():
            return False
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
