"""The lock of a run folder: one process at a time trains in it."""

from __future__ import annotations

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster.errors import ClusterError


@contextmanager
def exclusive(run: Path) -> Iterator[int]:
    """Hold the run folder; raises ClusterError when another process trains in it.

    Yields the descriptor that holds the lock. Ranks inherit it, so that those which save after
    this process was killed keep the folder too.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("a+")
    except OSError as error:
        raise ClusterError(f"cannot use the run folder {run}: {error.strerror}") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            owner = handle.read().strip() or "another process"
            raise ClusterError(
                f"{run} is in use by {owner}; wait for it, stop it, or choose another run.name"
            ) from None
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        yield handle.fileno()
