"""The imports of DeepSpeed and megatron-core, without what they load for features unused here.

Both load large packages for optional parts: DeepSpeed MLflow for its autotuner and torch's compiler
for Muon, megatron-core the compiler for fused kernels. Together that is half of what a rank does
before its first step.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


def import_deepspeed(cuda: bool, local_rank: int) -> None:
    """Import DeepSpeed for an accelerator, without compiling an extension on CPU machines.

    init_distributed would build deepspeed_shm_comm, which takes minutes; when that build is killed
    its lock file stays, and every later run on the machine waits for it forever.
    """
    quiet()
    os.environ["DS_ACCELERATOR"] = "cuda" if cuda else "cpu"
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # DeepSpeed insists on it
    with _hidden("mlflow"):
        import deepspeed
        import deepspeed.ops

    with _compiling_nothing():  # every engine imports it, whatever its optimizer
        import deepspeed.runtime.zero.muon.original_muon
    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not cuda:
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def import_megatron() -> None:
    """Import the parts of megatron-core that layers and process groups are made of."""
    quiet()
    if "megatron.core" in sys.modules:
        return
    with _compiling_nothing():
        import megatron.core.tensor_parallel  # noqa: F401


def warm_up() -> None:
    """Import the heavy libraries without touching any device or group, as before a fork."""
    import_deepspeed(cuda=False, local_rank=0)
    os.environ.pop("LOCAL_RANK")
    import_megatron()


def quiet() -> None:
    """Silence the warnings of optional kernels that CPU machines do not have."""
    warnings.filterwarnings("ignore", module=r"(megatron|deepspeed|torch)\..*")
    for name in ("megatron", "megatron.core", "DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _hidden(package: str) -> Iterator[None]:
    """Let imports of a package fail as if it were not installed; one imported before stays."""
    if package in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


@contextmanager
def _compiling_nothing() -> Iterator[None]:
    """Let `torch.compile` give functions back as they are: loading it takes two seconds.

    megatron-core decorates its fused activations and losses with it while it is imported, DeepSpeed
    a function of Muon. None of them is used here; they would compute the same, unfused.
    """
    import torch

    real: Any = torch.compile

    def unchanged(model: Any = None, **options: Any) -> Any:
        return model if model is not None else unchanged

    torch.compile = unchanged
    try:
        yield
    finally:
        torch.compile = real
