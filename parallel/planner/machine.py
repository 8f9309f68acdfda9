"""Cluster in numbers: memory and speed of one GPU, and of the links between GPUs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from parallel.errors import LayoutError

GIB = 2**30
_MAY_BE_ZERO = ("reserved_gib", "host_reserved_gib", "latency_us", "launch_us")


@dataclass(frozen=True)
class Machine:
    """Nodes of equal GPUs. Rates are per GPU unless stated otherwise; see `configs/machine/`."""

    name: str
    num_nodes: int
    gpus_per_node: int
    memory_gib: float
    """Memory of a GPU as the driver reports it."""
    bfloat16_tflops: float
    """Dense matrix products; also the denominator of MFU in bfloat16."""
    float32_tflops: float
    """Dense matrix products in float32 (TF32 off, as torch has it)."""
    memory_bandwidth_gbs: float
    """GB/s of the GPU's memory."""
    nvlink_gbs: float
    """GB/s that a GPU sends (and receives at the same time) inside a node."""
    network_gbs: float
    """GB/s that a whole node sends to other nodes."""
    reserved_gib: float = 5.0
    """Memory that tensors cannot use: CUDA context, NCCL's buffers, fragments of the allocator."""
    matrix_efficiency: float = 0.65
    """Share of the dense rate that large matrix products reach."""
    attention_efficiency: float = 0.40
    """Share that attention kernels reach, forward and backward together."""
    memory_efficiency: float = 0.75
    """Share of the memory bandwidth that elementwise kernels reach."""
    network_efficiency: float = 0.70
    """Share of a link that collectives of megabytes reach."""
    latency_us: float = 20.0
    """Time of a collective of size zero."""
    launch_us: float = 6.0
    """Time in which the host starts a kernel: below it the GPU waits."""
    host_memory_gib: float = 1024.0
    """Memory of a node, for `parallel.offload`."""
    host_reserved_gib: float = 128.0
    """Part of it that the processes themselves, their data and the system take."""
    host_bandwidth_gbs: float = 300.0
    """GB/s of a node's memory."""
    pcie_gbs: float = 25.0
    """GB/s between a GPU and host memory, one direction."""

    @property
    def num_gpus(self) -> int:
        """GPUs of all nodes."""
        return self.num_nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> float:
        """Memory of a GPU that tensors can use."""
        return (self.memory_gib - self.reserved_gib) * GIB

    @property
    def usable_host_bytes(self) -> float:
        """Memory of a node that offloaded tensors can use."""
        return (self.host_memory_gib - self.host_reserved_gib) * GIB

    def flops(self, precision: str) -> float:
        """Dense operations per second of one GPU."""
        return 1e12 * (self.bfloat16_tflops if precision == "bfloat16" else self.float32_tflops)

    @staticmethod
    def from_mapping(values: Mapping[str, Any], source: str) -> Machine:
        """The machine of a YAML file; raises LayoutError naming `source` and the key."""
        known = {field.name: field for field in fields(Machine)}
        for key in values:
            if key not in known:
                raise LayoutError(f"{source}: unknown key {key!r}; known: {', '.join(known)}")
        needed = [name for name, field in known.items() if not _has_default(field)]
        missing = [name for name in needed if name not in values]
        if missing:
            raise LayoutError(f"{source}: no value for {', '.join(missing)}")
        for key, value in values.items():
            if key == "name":
                continue
            whole = key in ("num_nodes", "gpus_per_node")
            good = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
            if not good or value < (1 if whole else 0):
                kind = "a whole number from 1" if whole else "a number from 0"
                raise LayoutError(f"{source}: {key} is {value!r}; it must be {kind}")
            if key.endswith("_efficiency") and not 0 < value <= 1:
                raise LayoutError(f"{source}: {key} is {value!r}; it must lie in (0, 1]")
            if value == 0 and key not in _MAY_BE_ZERO:
                raise LayoutError(f"{source}: {key} is 0; it must be larger")
        machine = Machine(**{**values, "name": str(values["name"])})
        for of in ("", "host_"):
            reserved = getattr(machine, f"{of}reserved_gib")
            memory = getattr(machine, f"{of}memory_gib")
            if reserved >= memory:
                raise LayoutError(
                    f"{source}: {of}reserved_gib {reserved} leaves nothing of {of}memory_gib "
                    f"{memory}"
                )
        return machine


def _has_default(field: Any) -> bool:
    from dataclasses import MISSING

    return field.default is not MISSING
