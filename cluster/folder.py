"""The locks of a run folder: one process at a time starts ranks in it, one set of ranks trains.

Rank 0 holds the folder while it trains, whatever started it, and so also after the process that
started it was killed. Starting needs the folder free.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from cluster.errors import ClusterError, FolderInUseError


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Hold the run folder to train in it.

    Raises FolderInUseError when another process trains there, ClusterError when the folder cannot
    be used.
    """
    with _locked(run, ".lock"):
        yield


@contextmanager
def starting(run: Path) -> Iterator[None]:
    """Hold the run folder to start ranks in it; raises as `exclusive` does.

    Nobody trains there when this begins; from then on the ranks hold it themselves.
    """
    with _locked(run, ".start.lock"):
        with exclusive(run):
            pass
        yield


def in_use(run: Path) -> bool:
    """True where a living process says that it trains in the run folder; takes no lock."""
    return _owner(run / ".lock.owner") is not None


@contextmanager
def _locked(run: Path, name: str) -> Iterator[None]:
    path, owner = run / name, run / f"{name}.owner"
    lock = FileLock(path)
    try:
        run.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        who = _owner(owner) or "another process"
        raise FolderInUseError(
            f"{run} is in use by {who}; wait for it, stop it, or choose another run.name"
        ) from None
    except OSError as error:
        raise ClusterError(f"cannot use the run folder {run}: {error.strerror}") from None
    try:
        with suppress(OSError):  # a full disk
            owner.write_text(f"{os.getpid()} {socket.gethostname()}")
        yield
    finally:
        with suppress(OSError):
            owner.unlink()
        lock.release()


def _owner(path: Path) -> str | None:
    """Process that holds a lock; None where that process has died and a child holds it."""
    try:
        pid, host = path.read_text().split()
        if host == socket.gethostname():
            os.kill(int(pid), 0)
    except (OSError, ValueError):
        return None
    return f"process {pid} on {host}"
