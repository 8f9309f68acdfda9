"""A rank whose launcher has died saves and ends, instead of holding its GPU for ever.

Killed processes leave their children running, DeepSpeed's launcher too. Polling is used because a
parent's death signal (PR_SET_PDEATHSIG) exists only on Linux, and ends with the thread that set it.
"""

from __future__ import annotations

import os
import signal
import threading
import time

LAUNCHER_PID = "EPOCHAL_LAUNCHER_PID"
"""Variable that tells a rank the process that started it and whose death ends it."""
_POLL_SECONDS = 1.0
_GRACE_SECONDS = 900.0
"""Time to save after the launcher's death; then the rank is killed."""


def end_with_launcher() -> None:
    """From now on treat the death of the parent that launched this rank as a SIGTERM.

    Returns at once. The parent is a process that set `LAUNCHER_PID`, or DeepSpeed's launcher; a
    rank started by hand has neither and may outlive its shell.
    """
    pid = os.environ.get(LAUNCHER_PID)
    parent = int(pid) if pid else _deepspeed_launcher()
    if parent is not None:
        threading.Thread(target=_watch, args=(parent,), name="orphan", daemon=True).start()


def _deepspeed_launcher() -> int | None:
    """Process id of DeepSpeed's launcher when it started this rank, also when it has died since."""
    if "CROSS_RANK" not in os.environ:  # set by deepspeed.launcher.launch alone
        return None
    import psutil

    parent = os.getppid()
    try:
        launched = parent == 1 or "deepspeed.launcher.launch" in psutil.Process(parent).cmdline()
    except psutil.Error:
        launched = True
    return (0 if parent == 1 else parent) if launched else None


def _watch(parent: int) -> None:
    """Poll for the day on which another process has taken over as parent."""
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    print("the launcher has died; saving and stopping", flush=True)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
