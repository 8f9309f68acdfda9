"""Everything process-wide, in one place: ranks from the environment, process groups, workarounds.

Environment variables are read here and nowhere else in this package. A process started without any
launcher is a run of one rank and needs no ports. torch, DeepSpeed and megatron-core are imported
inside functions, because together they cost several seconds.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from parallel.errors import LayoutError
from parallel.imports import import_deepspeed, import_megatron

if TYPE_CHECKING:
    import torch
    from torch.distributed import TCPStore

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt, from malloc.h."""


@dataclass(frozen=True)
class Environment:
    """Place of this process among the ranks, as its launcher gave it."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str | None
    """None when nothing launched this process: one rank that needs no rendezvous."""
    master_port: int | None
    listen_fd: int | None = None
    """Descriptor of a socket that listens at `master_port` already; rank 0 has inherited it."""


@dataclass(frozen=True)
class Runtime:
    """An initialised process: its rank, its device and the backend of its process groups."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str


def read_environment(env: Mapping[str, str] | None = None) -> Environment:
    """Ranks from RANK/WORLD_SIZE/... (launchers), else from SLURM's step, else one rank.

    Inside an sbatch script but outside `srun` SLURM sets SLURM_PROCID and SLURM_NTASKS too; only
    SLURM_STEP_NUM_TASKS tells that this process is one of several tasks.
    """
    env = os.environ if env is None else env
    if "RANK" in env:
        alone = env.get("WORLD_SIZE") == "1" and "MASTER_ADDR" not in env
        missing = [k for k in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if k not in env]
        if missing and not alone:
            raise LayoutError(
                f"RANK={env['RANK']} is set but {', '.join(missing)} is not. Start the run with "
                "the deepspeed launcher, torchrun or srun, or unset RANK to train on one rank"
            )
        return Environment(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env.get("LOCAL_RANK", "0")),
            master_addr=None if alone else env["MASTER_ADDR"],
            master_port=None if alone else int(env["MASTER_PORT"]),
            listen_fd=int(env["MASTER_LISTEN_FD"]) if "MASTER_LISTEN_FD" in env else None,
        )
    tasks = int(env.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks > 1:
        nodes = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", "localhost"))
        step = int(env.get("SLURM_JOB_ID", "0")) * 16 + int(env.get("SLURM_STEP_ID", "0"))
        return Environment(
            rank=int(env["SLURM_PROCID"]),
            world_size=tasks,
            local_rank=int(env["SLURM_LOCALID"]),
            master_addr=env.get("MASTER_ADDR", first_host(nodes)),
            master_port=int(env.get("MASTER_PORT", 20000 + step % 20000)),
        )
    return Environment(0, 1, 0, None, None)


def first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `gpu[01-04,7],login` gives `gpu01`."""
    match = re.match(r"([^,\[]+)(?:\[([^\]]+)\]([^,]*))?", nodelist)
    if match is None:
        raise LayoutError(f"cannot read a host name from SLURM's node list {nodelist!r}")
    prefix, numbers, suffix = match.groups()
    if numbers is None:
        return prefix
    return prefix + re.split(r"[-,]", numbers)[0] + (suffix or "")


def init_distributed(
    timeout_minutes: float = 30.0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    tensor_parallel_size: int = 1,
) -> Runtime:
    """Join the run's process group (nccl on CUDA, gloo on CPU) and prepare DeepSpeed and megatron.

    Calling it again returns the same group. Collectives that take longer than `timeout_minutes`
    end the process. `tensor_parallel_size` only decides how GPUs order their kernels.
    """
    import torch
    import torch.distributed as dist

    where = read_environment()
    if device != "cpu" and tensor_parallel_size > 1:
        order_kernels(compute_capability())
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise LayoutError(
            "device cuda was asked for, but torch sees no CUDA device; take auto or cpu"
        )
    if cuda and where.local_rank >= torch.cuda.device_count():
        raise LayoutError(
            f"rank {where.rank} is number {where.local_rank} on its machine (counted from 0), but "
            f"torch sees {torch.cuda.device_count()} GPUs there; start fewer ranks a machine"
        )
    if cuda:
        torch.cuda.set_device(where.local_rank)
    import_deepspeed(cuda, where.local_rank)
    import_megatron()
    if not torch.cuda.is_available():
        _stand_in_for_cuda()
    if not cuda:
        keep_freed_memory()
    timeout = timedelta(minutes=timeout_minutes)
    backend = "nccl" if cuda else "gloo"
    if not dist.is_initialized():
        _join(where, backend, timeout)
    import deepspeed

    deepspeed.init_distributed(dist_backend=backend, timeout=timeout, auto_mpi_discovery=False)
    torch_device = torch.device("cuda", where.local_rank) if cuda else torch.device("cpu")
    return Runtime(dist.get_rank(), dist.get_world_size(), where.local_rank, torch_device, backend)


def order_kernels(capability: int | None) -> None:
    """Let GPUs before Blackwell start kernels in the order in which the host enqueues them.

    megatron-core enqueues the all-reduce (or reduce-scatter) of an input gradient before the
    product that gives the weight's gradient, to hide one behind the other. With several hardware
    queues the product may take all multiprocessors first, and the message then waits for it.
    Without tensor parallelism a single queue would hold up ZeRO's messages for nothing; from
    compute capability 10 on it is not needed. A user's own setting stays. CUDA reads it once, when
    it starts.
    """
    if capability is not None and capability < 10:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def compute_capability() -> int | None:
    """Major number of the first GPU's compute capability, None without an NVIDIA driver.

    Asked of the driver's management library, because asking CUDA would start it.
    """
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = (
        library.nvmlInit_v2()
        or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu))
        or library.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor))
    )
    return None if failed else major.value


def shutdown() -> None:
    """Leave all process groups; harmless when there are none."""
    import sys

    import torch.distributed as dist

    if "megatron.core" in sys.modules:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:
        import deepspeed.comm.comm as deepspeed_comm
        from deepspeed.utils import groups

        deepspeed_comm.cdb = None
        groups.mpu = None


def _join(where: Environment, backend: str, timeout: timedelta) -> None:
    """The process group of all ranks; an unlaunched process makes one of its own, without ports."""
    import torch.distributed as dist
    from torch._C._distributed_c10d import HashStore

    if where.master_addr is None:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    if where.master_addr in ("127.0.0.1", "localhost"):
        # gloo otherwise resolves the host's own name, which fails or stalls in many containers.
        names = {name for _, name in socket.if_nameindex()}
        if "lo" in names:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    at: dict[str, Any] = {"init_method": f"tcp://{where.master_addr}:{where.master_port}"}
    if where.listen_fd is not None:
        at = {"store": _store_at(where, timeout)}
    dist.init_process_group(
        backend, rank=where.rank, world_size=where.world_size, timeout=timeout, **at
    )


def _store_at(where: Environment, timeout: timedelta) -> TCPStore:
    """The store of a rendezvous whose socket listens already, handed to rank 0."""
    from torch.distributed import TCPStore

    assert where.master_addr is not None and where.master_port is not None
    return TCPStore(
        where.master_addr,
        where.master_port,
        where.world_size,
        is_master=where.rank == 0,
        timeout=timeout,
        master_listen_fd=where.listen_fd if where.rank == 0 else None,
    )


def _stand_in_for_cuda() -> None:
    """Let megatron's gather and sequence-parallel mappings allocate on a machine without CUDA.

    They take their buffers on torch.cuda.current_device(), which raises where torch has no CUDA.
    """
    import torch

    cpu = torch.device("cpu")
    torch.cuda.current_device = lambda: cpu  # type: ignore[assignment,return-value]


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next one, instead of giving it back to the kernel.

    Large tensors otherwise come as fresh pages every time, each of which the kernel fills with
    zeros when it is first touched: a sixth of a small model's step. The process stays as large as
    its largest step. A user's own settings of the allocator (MALLOC_*_) are left alone.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    allocator = ctypes.CDLL(None)
    allocator.mallopt(_M_MMAP_MAX, 0)
    allocator.mallopt(_M_TRIM_THRESHOLD, -1)
