"""A folder of its own for the optimizer state that a rank swaps to disk, gone when the rank is.

Runs that share `parallel.offload_path` must not write over each other, and a killed rank cannot
tidy up. So every rank makes a new folder and holds a lock in it; the kernel gives the lock back
when the rank ends, however it ends, and the next rank to start removes what nobody holds.
"""

from __future__ import annotations

import atexit
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.async_io import missing_for_swapping
from parallel.errors import LayoutError

_PREFIX = "epochal-swap-"
_LOCK = "lock"


def own_folder(root: Path) -> Path:
    """A new folder below `root` (made if missing) for this process; raises OSError.

    Folders that ended processes left there are removed first.
    """
    root.mkdir(parents=True, exist_ok=True)
    with _alone(root / ".epochal-swap-lock"):
        _remove_leftovers(root)
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=root))
        handle = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
        fcntl.flock(handle, fcntl.LOCK_EX)  # held until this process ends
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def check_swapping(root: Path, cuda: bool = False) -> None:
    """LayoutError unless this machine can build `async_io` and write to `root`, which is made.

    With `cuda` the ranks run on GPUs.
    """
    missing = missing_for_swapping(cuda)
    if missing is not None:
        raise LayoutError(
            f"parallel.offload=nvme needs {missing} for DeepSpeed's extension async_io, which is "
            "built at the first start; install it, or set parallel.offload to cpu"
        )
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        raise LayoutError(
            f"cannot write to parallel.offload_path {root}: {error.strerror}; name a folder on a "
            "disk of this machine that you may write to"
        ) from None


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """While inside, no other process of this node makes or removes folders."""
    handle = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(root: Path) -> None:
    for folder in root.glob(f"{_PREFIX}*"):
        try:
            handle = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(handle)
