"""`epochal doctor`: versions and devices of this machine, and problems that a run would meet.

Each check is a function that returns findings; a check that fails is a finding too. Versions are
read from package metadata, because to import all packages would take half a minute.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Level = Literal["ok", "note", "bad"]
_PACKAGES = ("torch", "deepspeed", "megatron-core", "webdataset", "sentencepiece", "mlflow")
_FREE_GIB = 5.0
"""Free disk space in GiB below which a demo and its checkpoints may not fit."""
_STALE_MINUTES = 10.0
"""Age in minutes from which the lock file of an extension build counts as stale."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    found: str
    level: Level = "ok"
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Finding as plain JSON."""
        return asdict(self)


def examine() -> list[Finding]:
    """Run every check, in order."""
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        check_python,
        check_packages,
        check_devices,
        check_disk,
        check_extension_locks,
        check_process_group,
    )
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check()
        except Exception as error:
            name = check.__name__.removeprefix("check_").replace("_", " ")
            findings.append(Finding(name, f"{type(error).__name__}: {error}", "bad"))
    return findings


def check_python() -> Iterator[Finding]:
    """Check for Python 3.11 or 3.12: megatron-core 0.16 needs 3.11, newer ones 3.12."""
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] < (3, 13)
    advice = "" if good else "create the environment with Python 3.11 or 3.12"
    yield Finding("python", f"{version} at {sys.executable}", "ok" if good else "bad", advice)


def check_packages() -> Iterator[Finding]:
    """Compare installed versions with the ranges that this distribution was tested with."""
    from packaging.requirements import Requirement

    wanted = {r.name: r for r in map(Requirement, metadata.requires("epochal") or [])}
    for name in _PACKAGES:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "not installed", "bad", "pip install -c constraints.txt -e .")
            continue
        allowed = wanted[name].specifier if name in wanted else None
        if allowed is not None and not allowed.contains(version, prereleases=True):
            yield Finding(name, version, "bad", f"tested with {allowed}; see constraints.txt")
        else:
            yield Finding(name, version)


def check_devices() -> Iterator[Finding]:
    """Find cores, GPUs and the attention kernels that `model.attention=auto` takes."""
    import torch

    yield Finding("cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        driver = Path("/proc/driver/nvidia/version").exists()
        advice = "this torch was built without CUDA, or its driver is too old" if driver else ""
        found = "driver loaded, but torch sees no GPU" if driver else "none: training on the CPU"
        yield Finding("gpu", found, "bad" if driver else "note", advice)
        return
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        yield Finding(f"gpu {index}", f"{device.name}, {device.total_memory / 2**30:.0f} GiB")
    from pretrain.model.attention import Call, describe_kernels

    kernels = describe_kernels(
        "auto",
        ("causal", "bidirectional", "documents", "columns"),
        Call("cuda", torch.bfloat16, 128),
    )
    advice = "" if "flash-attn" in kernels else "flash-attn is optional: pip install -e .[gpu]"
    yield Finding("attention", f"{kernels} (bfloat16, heads of 128)", "ok", advice)


def check_disk() -> Iterator[Finding]:
    """Check that the current folder can be written and has free space."""
    here = Path.cwd()
    try:
        with tempfile.TemporaryFile(dir=here):
            pass
    except OSError as error:
        advice = "runs are written below the current folder; change it or set run.root"
        yield Finding("write access", f"{here}: {error.strerror}", "bad", advice)
    free = shutil.disk_usage(here).free / 2**30
    low = free < _FREE_GIB
    advice = "train.keep_checkpoints bounds what a run keeps" if low else ""
    yield Finding("free disk", f"{free:.1f} GiB in {here}", "note" if low else "ok", advice)


def check_extension_locks() -> Iterator[Finding]:
    """Find stale locks of killed extension builds, on which later runs would wait for ever."""
    given = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(given) if given else Path.home() / ".cache" / "torch_extensions"
    locks = list(root.glob("**/lock")) if root.is_dir() else []
    old = [p for p in locks if time.time() - p.stat().st_mtime > 60 * _STALE_MINUTES]
    if old:
        listed = ", ".join(str(p) for p in old)
        yield Finding("extension builds", f"stale lock: {listed}", "bad", f"rm {listed}")
    else:
        yield Finding("extension builds", f"no stale lock in {root}")


def check_process_group() -> Iterator[Finding]:
    """Start a gloo group of one rank, which fails on a bad host name or a blocked loopback."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group(
            "gloo", init_method=store, rank=0, world_size=1, timeout=timedelta(seconds=20)
        )
        try:
            value = torch.ones(1)
            dist.all_reduce(value)
        finally:
            dist.destroy_process_group()
    yield Finding("gloo", "a process group of one rank works")
