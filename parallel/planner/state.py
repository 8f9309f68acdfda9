"""Bytes of parameters, optimizer and gradients on a rank: exactly what DeepSpeed allocates.

Each function mirrors one of its optimizers as `parallel.engine.settings` configures it: none (stage
0 in float32), BF16_Optimizer (stage 1 in bfloat16), the optimizer of stages 1 and 2, that of stage
3. `tests/distributed/test_planner.py` compares them with the tensors of real engines, to the byte.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from parallel.engine.optimizer import StateGroup
from parallel.layout.rules import overlaps
from parallel.planner.candidate import Candidate
from parallel.planner.costs import Weight
from parallel.planner.offload import offloaded_flat, offloaded_whole

_MASTER = 4
"""Bytes of a float32 weight."""
_ALIGNMENT = 2
"""Elements to which DeepSpeed aligns the share of each rank."""
LIVE = 1_000_000_000
"""Elements that stage 3 keeps gathered at most."""
PREFETCH = 50_000_000
"""Elements that stage 3 prefetches."""
ALL_REDUCE = 500_000_000
"""Elements that BF16_Optimizer copies into one message."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes on one rank."""

    parameters: int
    """Weights in the compute precision (at stage 0 they are the only copy)."""
    optimizer: int
    """Float32 copies of the weights where they exist, and optimizer state; wherever they are."""
    averages: int
    """Float32 averages of the weights (EMA); wherever they are."""
    gradients: int
    """Gradients that backward passes accumulate until the step."""
    gathered: int
    """Buckets of stages 1 to 3 and weights gathered by stage 3, besides the activations."""
    update: int
    """Buffers of the reduction and the update after the last backward pass."""
    host: int = 0
    """Bytes in host memory, where something is offloaded: of the above, and copies."""


@dataclass(frozen=True)
class _Group:
    """Weights that the optimizer updates as one group."""

    sizes: list[int]
    """Elements of each on one rank."""
    state: StateGroup


def state_bytes(weights: Iterable[Weight], candidate: Candidate) -> StateBytes:
    """Bytes for the weights of a pipeline stage (given with the sizes of the whole model)."""
    tp, optimizer = candidate.layout.tensor_parallel_size, candidate.optimizer
    found: dict[tuple[int, str], _Group] = {}
    for weight in weights:
        state = optimizer.group(weight.name, weight.shape)
        group = found.setdefault((weight.group, state.name), _Group([], state))
        group.sizes.append(weight.held(tp))
    groups = list(found.values())
    if candidate.effective_stage == 0:
        return _stage_0(groups, candidate)
    if candidate.effective_stage == 3:
        return _stage_3(groups, candidate)
    return _flat(groups, candidate)


def mean_state_bytes(weights: Iterable[Weight], candidate: Candidate) -> float:
    """Bytes of optimizer state for each element, on average over these weights."""
    tp, optimizer = candidate.layout.tensor_parallel_size, candidate.optimizer
    elements = total = 0
    for weight in weights:
        held = weight.held(tp)
        elements += held
        total += held * optimizer.group(weight.name, weight.shape).element_bytes
    return total / elements


def _stage_0(groups: list[_Group], candidate: Candidate) -> StateBytes:
    """Stage 0: plain float32 tensors."""
    total = sum(size for group in groups for size in group.sizes)
    return StateBytes(
        parameters=4 * total,
        optimizer=sum(
            group.state.element_bytes * sum(group.sizes)
            + group.state.counter_bytes * len(group.sizes)
            for group in groups
        ),
        averages=4 * total * candidate.averages,
        gradients=4 * total,
        gathered=0,
        update=4 * min(total, ALL_REDUCE) if candidate.shards > 1 else 0,
    )


def _flat(groups: list[_Group], candidate: Candidate) -> StateBytes:
    """Stages 1 and 2: weights flattened group by group, padded to a multiple of the ranks."""
    shards, size = candidate.shards, candidate.compute_bytes
    multiple = _ALIGNMENT * shards
    padded = [-(-sum(group.sizes) // multiple) * multiple for group in groups]
    shares = [n // shards for n in padded]
    total, share = sum(padded), sum(shares)
    bucket, buffers = candidate.reduce_bucket_size, 1
    largest = max(size for group in groups for size in group.sizes)
    if overlaps(candidate.zero_stage, candidate.overlap_comm):
        # One is filled while the other is reduced, and either takes the largest gradient.
        bucket, buffers = max(bucket, largest), 2
    if candidate.zero_stage == 1 and candidate.precision == "bfloat16":
        # bfloat16 gradients stay besides the float32 ones to which they are added.
        gradients, gathered = (2 + 4) * total, 0
        update = 4 * min(total, ALL_REDUCE) if shards > 1 else 0
    elif candidate.zero_stage == 1:
        gradients, gathered, update = size * total, buffers * size * bucket, 4 * share
    else:
        # A larger tensor than the bucket is reduced alone; both once more in float32.
        gradients, update = 4 * share, 4 * share
        gathered = buffers * size * bucket + (size + 4) * max(bucket, largest)
    state = StateBytes(
        parameters=size * total,
        optimizer=_MASTER * share + _sharded(shares, groups),
        averages=4 * share * candidate.averages,
        gradients=gradients,
        gathered=gathered,
        update=update,
    )
    if not candidate.offloads:
        return state
    return offloaded_flat(state, shares, largest, candidate)


def _stage_3(groups: list[_Group], candidate: Candidate) -> StateBytes:
    """Stage 3: every tensor in equal shards; small ones whole as well."""
    shards, size = candidate.shards, candidate.compute_bytes
    shares = [sum(-(-n // shards) for n in group.sizes) for group in groups]
    share = sum(shares)
    small = sum(n for group in groups for n in group.sizes if n <= candidate.whole_below)
    large = sum(n for group in groups for n in group.sizes) - small
    if shards == 1:  # a shard is the tensor itself
        small = large = 0
    state = StateBytes(
        parameters=size * (share + small),
        optimizer=_MASTER * share + _sharded(shares, groups),
        averages=4 * share * candidate.averages,
        gradients=4 * share,
        gathered=4 * candidate.reduce_bucket_size + size * min(large, LIVE + PREFETCH),
        update=0,
    )
    return offloaded_whole(state, shares, small, candidate) if candidate.offloads else state


def _sharded(shares: list[int], groups: list[_Group]) -> int:
    """Bytes of the state of a rank's flat tensors, one of so many elements for each group."""
    kept = [group.state for group in groups]
    return sum(k.element_bytes * n + k.counter_bytes for n, k in zip(shares, kept, strict=True))
