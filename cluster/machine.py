"""Facts about this machine that decide where ranks may run; asked without importing torch."""

from __future__ import annotations

import os
import socket
from pathlib import Path

from cluster.errors import ClusterError

DRIVER = ("/dev/nvidiactl", "/proc/driver/nvidia/version")
"""Files that exist where an NVIDIA driver is loaded."""


def has_gpu() -> bool:
    """True where an NVIDIA driver is loaded; asked of the kernel, because torch takes seconds."""
    return any(Path(path).exists() for path in DRIVER)


def cores() -> int:
    """Number of cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def is_this_machine(hosts: tuple[str, ...]) -> bool:
    """True when no host of the list is another machine."""
    return set(hosts) <= {"localhost", "127.0.0.1", socket.gethostname()}


def check_visible_gpus(shown: str | None, ranks: int) -> None:
    """Raise ClusterError when CUDA_VISIBLE_DEVICES (None: all) shows fewer GPUs than ranks."""
    if shown is None:
        return
    count = sum(1 for device in shown.split(",") if device.strip())
    if count < ranks:
        raise ClusterError(
            f"CUDA_VISIBLE_DEVICES={shown} shows {count} GPUs, but {ranks} ranks need one each; "
            f"show more GPUs or start fewer ranks (parallel.*)"
        )


def visible_gpus() -> tuple[str, ...]:
    """Names of the NVIDIA GPUs that this process may use, as CUDA_VISIBLE_DEVICES has them."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is not None:
        return tuple(device.strip() for device in shown.split(",") if device.strip())
    devices = Path("/dev").glob("nvidia[0-9]*")
    numbers = sorted(int(name) for p in devices if (name := p.name[6:]).isdecimal())
    return tuple(str(number) for number in range(len(numbers)))
