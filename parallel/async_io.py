"""DeepSpeed's extension `async_io`, which swapping to disk needs: what builds it, and building it.

DeepSpeed compiles it at the first use, one file a core, which takes minutes once a machine. It
guards the build by a file that a killed build leaves behind, and then every later start waits for
ever. Here the kernel guards it: a lock that ends with the process that holds it. Whoever has that
one may remove the file; DeepSpeed programs of others that build at the same moment are not seen.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from parallel.errors import LayoutError

log = logging.getLogger(__name__)

_EXTENSIONS = ("pin_memory", "async_io")
_SHOWN_LINES = 12
"""Last lines of the compiler's complaint that a user sees."""


def missing_for_swapping(cuda: bool = False) -> str | None:
    """What this machine lacks to build `async_io`, in words; None when nothing.

    With `cuda` the build is that for GPUs, which also needs the toolkit.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return "a C++ compiler (on Debian the package g++)"
    command = [compiler, "-x", "c++", "-", "-laio", "-o", os.devnull]
    program = b"#include <libaio.h>\nint main() { return io_submit(0, 0, nullptr); }\n"
    if subprocess.run(command, input=program, capture_output=True).returncode:
        return "the headers of libaio (on Debian the package libaio-dev)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "the headers of Python (on Debian the package python3-dev)"
    if ninja_folder() is None:
        return "the program ninja (pip install ninja)"
    if cuda and not _has_toolkit():
        return "the CUDA toolkit (set CUDA_HOME to its folder)"
    return None


def ninja_folder() -> Path | None:
    """Where the program ninja is: on the PATH, or beside this Python, whose environment may not
    be activated; None when nowhere."""
    scripts = sysconfig.get_path("scripts")
    found = shutil.which("ninja") or shutil.which("ninja", path=scripts)
    return None if found is None else Path(found).parent


def load_async_io(load: Callable[[Path], None] | None = None) -> None:
    """Load `async_io` into this process, built first where it is not; raises LayoutError.

    One process builds, the others wait for it. `load` stands in for DeepSpeed's own way.
    """
    ninja = ninja_folder()
    if ninja is not None and shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([os.environ.get("PATH", os.defpath), str(ninja)])
    folders = build_folders()
    with _alone(folders[-1].parent / ".epochal-build-lock") as guarded:
        if guarded:
            for folder in folders:
                (folder / "lock").unlink(missing_ok=True)
        try:
            (load or _load)(folders[-1])
        except (RuntimeError, OSError, ImportError, TypeError) as error:
            said = "\n".join(str(error).splitlines()[-_SHOWN_LINES:])
            raise LayoutError(
                "DeepSpeed's extension async_io, which parallel.offload=nvme needs, could not be "
                f"built in {folders[-1]}; set parallel.offload to cpu to do without. The build "
                f"said:\n{said}"
            ) from error


def _load(folder: Path) -> None:
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not installed_ops.get("async_io") and not (folder / "async_io.so").exists():
        log.warning("building DeepSpeed's extension async_io in %s: minutes, once", folder)
    AsyncIOBuilder().load(verbose=False)


def build_folders() -> list[Path]:
    """Folders of the two extensions, `async_io` last, made if missing; raises LayoutError."""
    from torch.utils.cpp_extension import _get_build_directory

    try:
        folders = [Path(_get_build_directory(name, False)) for name in _EXTENSIONS]
        with tempfile.TemporaryFile(dir=folders[-1]):
            return folders
    except OSError as error:
        raise LayoutError(
            f"cannot build DeepSpeed's extension async_io, which parallel.offload=nvme needs: "
            f"{error.strerror}: {error.filename}; set TORCH_EXTENSIONS_DIR to a folder that you "
            "may write to"
        ) from None


def _has_toolkit() -> bool:
    """Whether torch would find the toolkit's folder; its own answer takes an import of seconds."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return bool(named) or shutil.which("nvcc") is not None or Path("/usr/local/cuda").exists()


@contextmanager
def _alone(file: Path) -> Iterator[bool]:
    """While inside, no other process builds; False where the file system knows no locks."""
    handle = os.open(file, os.O_CREAT | os.O_RDWR)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True
    finally:
        os.close(handle)
