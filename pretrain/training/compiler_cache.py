"""The folder of compiled kernels: one for each version of torch and Python, replaced when damaged.

A process that is killed while it compiles can leave an empty object in inductor's cache, and every
later compilation with that folder fails. Then the ranks are started once more with a fresh folder.
"""

from __future__ import annotations

import os
import platform
import shutil
import uuid
from collections.abc import MutableMapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from cluster.outcome import Outcome

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_ERRORS = ("BackendCompilerFailed", "InductorError", "CppCompileError")


def default_cache() -> Path:
    """Folder of this version of torch and Python."""
    name = f"torch-{version('torch')}-python-{platform.python_version()}"
    return Path.home() / ".cache" / "epochal" / "inductor" / name


def use_default_cache(environment: MutableMapping[str, str]) -> None:
    """Name the folder to torch, unless the user has named one."""
    with suppress(RuntimeError):  # nobody's home
        environment.setdefault(VARIABLE, str(default_cache()))


def fresh_cache() -> Path:
    """A new name beside the default folder."""
    folder = default_cache()
    return folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")


def compilation_failed(outcome: Outcome) -> bool:
    """True where a rank failed because torch could not compile."""
    message = outcome.message
    return outcome.state == "failed" and any(f"{name}:" in message for name in _ERRORS)


def adopt(fresh: Path) -> None:
    """Put a folder that works in the place of the default one."""
    folder = default_cache()
    with suppress(OSError):
        if folder.exists():
            damaged = folder.with_name(f"{folder.name}-damaged-{os.getpid()}")
            os.replace(folder, damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        os.replace(fresh, folder)
