"""Cost of `parallel.offload`: bytes in host memory, seconds of a step.

Mirrors DeepSpeed's optimizers as `parallel.engine.settings` configures them. Tensors that it pins
are rounded up to a power of two, as torch's allocator of pinned memory does; those add up to a good
part of what a node has. Times assume that nothing overlaps, as elsewhere in the planner: gradients
are copied to the host, the update runs there at the bandwidth of its memory, weights are copied
back.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from parallel.planner.candidate import Candidate
from parallel.planner.machine import Machine

if TYPE_CHECKING:
    from parallel.planner.state import StateBytes

_UPDATE = 28
"""Host memory traffic of an element's update, in bytes: norm 4, clipping 8, gradient and weight
read 8, weight written 4, and the copy in the compute precision, at most 4. State comes on top, read
and written."""
_AVERAGE = 12
"""The same of its average: both read, one written."""


def pinned(size: float) -> int:
    """Bytes that a pinned tensor of `size` bytes takes."""
    return 1 << (int(size) - 1).bit_length() if size > 0 else 0


def offloaded_flat(
    state: StateBytes, groups: list[int], largest: int, candidate: Candidate
) -> StateBytes:
    """Stages 1 and 2; `groups` are elements of this rank's shards, `largest` of a parameter."""
    size, bucket = candidate.compute_bytes, candidate.reduce_bucket_size
    share, total = sum(groups), sum(groups) * candidate.shards
    widened = candidate.precision == "bfloat16"  # gradients add up in float32, in one flat share
    if candidate.zero_stage == 1:
        gradients = 4 * total + (4 * share if widened else 0)
    else:
        gradients = 4 * share if widened else 0
    # Float32 gradients of stage 2 add up on the host.
    summed = 4 * share if candidate.zero_stage == 2 and not widened else 0
    fixed = [4 * n for n in groups] * 2 + [size * n for n in groups]  # weights, gradients, copies
    host = sum(pinned(n) for n in fixed) + pinned(size * largest)
    return replace(
        state,
        gradients=gradients,
        gathered=size * bucket + (size + 4) * max(bucket, largest) + size * largest,
        update=0,
        host=host + state.optimizer - 4 * share + summed + state.averages,
    )


def offloaded_whole(
    state: StateBytes, groups: list[int], whole: int, candidate: Candidate
) -> StateBytes:
    """Stage 3; `groups` are elements of this rank's shards, `whole` of parameters kept whole."""
    size, share = candidate.compute_bytes, sum(groups)
    weights = sum(pinned(size * n) for n in groups)
    summed = pinned(4 * share)  # gradients of the micro-batches
    state = replace(state, parameters=size * whole, gradients=0)
    gradients = sum(pinned(4 * n) for n in groups)
    held = state.optimizer + gradients + state.averages
    return replace(state, host=weights + summed + held)


def offload_seconds(
    candidate: Candidate, machine: Machine, elements: int, state_bytes: float
) -> tuple[float, float]:
    """Seconds of a step beyond that on the GPU, and bytes over PCIe both ways, of a rank that holds
    `elements` parameters of its stage, with `state_bytes` of optimizer state each."""
    if not candidate.offloads:
        return 0.0, 0.0
    share, size, count = elements / candidate.shards, candidate.compute_bytes, 1
    up = size  # updated weights
    if candidate.effective_stage == 3:
        count = candidate.num_microbatches
        up = 2 * size * count  # weights, for both passes of each micro-batch
    elif candidate.effective_stage == 2 and candidate.precision == "float32":
        count = candidate.num_microbatches
    # Gradients go down, and up again for each micro-batch that adds to them.
    down, again = 4 * count, 4 * (count - 1)
    moved = share * (up + down + again)
    ranks = min(machine.gpus_per_node, candidate.layout.world_size)
    traffic = _UPDATE + 2 * state_bytes + _AVERAGE * candidate.averages
    seconds = moved / (machine.pcie_gbs * 1e9 * machine.network_efficiency)
    rate = machine.host_bandwidth_gbs * 1e9 * machine.memory_efficiency / ranks
    seconds += share * traffic / rate
    return seconds, moved
