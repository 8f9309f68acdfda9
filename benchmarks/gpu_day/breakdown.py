"""The time of a step: kernels by class, and places at which the host waits."""

from __future__ import annotations

import re
import time
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from gpu_day.facts import synchronise
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

KERNEL_CLASSES = (
    ("attention", r"flash|fmha|attention|flex|sdpa"),
    ("optimizer", r"adam|multi_tensor"),
    ("collective", r"nccl|all_?reduce|all_?gather|reduce_scatter"),
    ("matrix product", r"gemm|gemv|nvjet|cutlass|xmma|wgmma|splitk|aten::(mm|addmm|bmm)$"),
    ("copy", r"memcpy|memset|copy|fill|zero|cat"),
    ("norm, softmax, sum", r"norm|softmax|reduce|amax|aten::sum|logsumexp"),
    ("gather, scatter", r"index|gather|scatter|embedding|sort|radix"),
    ("elementwise", r"elementwise|triton|aten::(mul|add|sub|exp|div|silu|addcmul|neg|where)"),
)
"""Classes of kernels, the first whose pattern is found in the lower-case name."""
LISTED = 45
"""Kernels that are written out, those with most time first."""


class Kernel(NamedTuple):
    """A kernel (on a CPU an operation) and its time over a step."""

    name: str
    microseconds: float
    count: int


def profiled(
    step: Callable[[], Any], device: torch.device, label: str, path: Path | None
) -> dict[str, float]:
    """Shares of the device's time by class in one step; kernels and waits are added to `path`."""
    waits = host_waits(step) if device.type == "cuda" else []
    step()
    synchronise(device)
    cuda = device.type == "cuda"
    start = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as recorded:
        step()
        synchronise(device)
    seconds = time.perf_counter() - start
    kernels = kernels_of(recorded.key_averages(), cuda)
    if path is not None:
        with path.open("a") as file:
            file.write("\n".join(report(label, seconds, kernels, waits)) + "\n")
    return kernel_shares(kernels)


def kernels_of(events: Iterable[Any], cuda: bool) -> list[Kernel]:
    """Kernels of torch's profiler, longest first.

    On CUDA an operation of the host may be given the time of the kernels that it started, and a
    named range that of all kernels inside: neither counts.
    """
    if not cuda:
        found = [Kernel(e.key, float(e.self_cpu_time_total), e.count) for e in events]
    else:
        found = [
            Kernel(e.key, float(e.self_device_time_total), e.count)
            for e in events
            if e.device_type != DeviceType.CPU and not getattr(e, "is_user_annotation", False)
        ]
    return sorted(found, key=lambda kernel: -kernel.microseconds)


def kernel_class(name: str) -> str:
    """Class of a kernel by its name."""
    found = (kind for kind, pattern in KERNEL_CLASSES if re.search(pattern, name.lower()))
    return next(found, "other")


def kernel_shares(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Share of the time by class, largest first; classes without time are left out."""
    total: dict[str, float] = defaultdict(float)
    for kernel in kernels:
        total[kernel_class(kernel.name)] += kernel.microseconds
    every = sum(total.values()) or 1.0
    ordered = sorted(total.items(), key=lambda item: -item[1])
    return {kind: time_ / every for kind, time_ in ordered if time_ > 0}


def host_waits(step: Callable[[], Any]) -> list[tuple[str, int]]:
    """Places at which the host waits for the device in a step, and how often, as CUDA reports."""
    found: Counter[str] = Counter()

    def note(message: Any, *rest: Any, **more: Any) -> None:
        frames = [
            f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
            for frame in traceback.extract_stack()
            if "/torch/" not in frame.filename
            and not frame.filename.endswith(("breakdown.py", "warnings.py"))
        ]
        if "synchroniz" in str(message) and frames:
            found[" < ".join(frames[:-4:-1])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return found.most_common()


def report(
    label: str, seconds: float, kernels: list[Kernel], waits: list[tuple[str, int]]
) -> list[str]:
    """Lines of text: the step, where the host waited, the kernels with most time."""
    busy = sum(kernel.microseconds for kernel in kernels) / 1e3
    lines = [f"== {label}: {seconds * 1e3:.1f} ms with the profiler, device busy {busy:.1f} ms"]
    lines += [f"host waits {count}x at {place}" for place, count in waits]
    lines += [
        f"{k.microseconds / 1e3:9.2f} ms {k.count:6d}x  {kernel_class(k.name):20s} {k.name[:130]}"
        for k in kernels[:LISTED]
    ]
    return lines
