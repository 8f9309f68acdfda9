"""Time of a step: a roofline for each part, its collectives, and the pipeline's schedule.

Nothing is assumed to overlap, although some of it does: neither gradient reduction with the
backward pass (`overlap_comm`) nor tensor-parallel messages with matrix products. A kernel takes the
longest of its operations, its memory traffic and the time in which the host starts it. So the
estimate is meant to be an upper bound for a machine whose efficiencies (`configs/machine/`) are
right.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost, Part
from parallel.planner.machine import Machine
from parallel.planner.memory import StageParts, layer_positions, scored_rows
from parallel.planner.offload import offload_seconds
from parallel.planner.traffic import (
    context_messages,
    data_messages,
    pipeline_messages,
    recomputed_layers,
    seconds,
    tensor_messages,
)

_UPDATE_BYTES = 14
"""Memory traffic of the update of a parameter: gradient and weight read, weight and its copy in the
compute precision written. State comes on top, read and written."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step, and bytes that the busiest rank sends in it."""

    compute: float
    """Forward and backward passes of the slowest stage, over all micro-batches."""
    tensor: float
    context: float
    pipeline: float
    """Sending between stages."""
    bubble: float
    """Stages waiting for each other."""
    data: float
    """Gradients and weights between data-parallel ranks."""
    update: float
    """Update on the GPU."""
    offload: float
    """Copies to host memory and back, and the update there."""
    sent: dict[str, float]
    """Bytes by kind of parallelism: dp, tp, cp, pp; and over PCIe: host."""

    @property
    def total(self) -> float:
        """Seconds of a step."""
        passes = self.compute + self.tensor + self.context + self.pipeline + self.bubble
        return passes + self.data + self.update + self.offload

    @property
    def bubble_share(self) -> float:
        """Share of the step in which the average stage waits for another."""
        return self.bubble / self.total


def step_time(
    model: ModelCost, candidate: Candidate, machine: Machine, stages: list[StageParts]
) -> StepTime:
    """Time of a step whose pipeline has these stages."""
    layout, count = candidate.layout, candidate.num_microbatches
    tp, cp = layout.tensor_parallel_size, layout.context_parallel_size
    hop = seconds(pipeline_messages(model, candidate), machine, 2, tp * cp * _dp(candidate))
    passes = []
    for stage in stages:
        tensor = tensor_messages(model, candidate, stage)
        context = context_messages(model, candidate, stage)
        passes.append(
            (
                stage_seconds(model, candidate, machine, stage),
                seconds(tensor, machine, tp, 1),
                seconds(context, machine, cp, tp),
                hop,
                tensor.bytes,
                context.bytes,
            )
        )
    slowest = max(passes, key=lambda p: sum(p[:4]))
    ends = sum(sum(p[:4]) for p in passes) - sum(slowest[:4])
    largest = max(stages, key=lambda stage: stage.held(tp))
    elements, tensors = largest.held(tp)
    state = largest.mean_state(candidate)
    data = data_messages(candidate, elements, tensors)
    share = elements / (candidate.shards if candidate.effective_stage else 1)
    rate = machine.memory_bandwidth_gbs * 1e9 * machine.memory_efficiency
    updated = _UPDATE_BYTES + 2 * state
    away, moved = offload_seconds(candidate, machine, elements, state)
    return StepTime(
        compute=count * slowest[0],
        tensor=count * slowest[1],
        context=count * slowest[2],
        pipeline=count * slowest[3],
        bubble=ends,
        data=seconds(data, machine, candidate.shards, tp),
        update=0.0 if candidate.offloads else updated * share / rate,
        offload=away,
        sent={
            "dp": data.bytes,
            "tp": count * slowest[4],
            "cp": count * slowest[5],
            "pp": count * pipeline_messages(model, candidate).bytes,
            "host": moved,
        },
    )


def stage_seconds(
    model: ModelCost, candidate: Candidate, machine: Machine, stage: StageParts
) -> float:
    """Forward and backward of one micro-batch through a stage, without messages."""
    positions = layer_positions(model, candidate)
    layer = part_seconds(model.layer, positions, candidate, machine)
    again = recomputed_layers(candidate, stage) * layer
    if candidate.recompute == "selective":
        again = stage.num_layers * _elementwise(model.layer, positions, candidate, machine)
    passes = 3 + model.extra_passes  # forward, twice that backward, and those without gradient
    total = passes * stage.num_layers * layer + again
    if stage.first:
        total += passes * part_seconds(model.first, positions, candidate, machine)
    if stage.last:
        rows = scored_rows(model, candidate)
        total += passes * part_seconds(model.last, rows, candidate, machine)
        total += _chunk_seconds(model, rows, candidate, machine)
    return total


def _chunk_seconds(model: ModelCost, rows: float, candidate: Candidate, machine: Machine) -> float:
    """Seconds in which chunks of logits add to the float32 gradient of the head's weight."""
    loss, tp = model.loss, candidate.layout.tensor_parallel_size
    chunks = rows / loss.rows_at_once(rows, tp)
    if chunks <= 1:
        return 0.0
    moved = (8 + candidate.compute_bytes) * loss.vocabulary * loss.hidden_size / tp
    return chunks * moved / (machine.memory_bandwidth_gbs * 1e9 * machine.memory_efficiency)


def part_seconds(part: Part, positions: float, candidate: Candidate, machine: Machine) -> float:
    """Forward pass of a part over the positions of a micro-batch."""
    tp, peak = candidate.layout.tensor_parallel_size, machine.flops(candidate.precision)
    matrices = part.matrix_flops * positions / tp / (peak * machine.matrix_efficiency)
    # Few positions leave a matrix product waiting for its weights.
    rate = machine.memory_bandwidth_gbs * 1e9 * machine.memory_efficiency
    weights = part.matrix_flops / 2 / tp * candidate.compute_bytes / rate
    attention = part.attention_flops * positions / tp / (peak * machine.attention_efficiency)
    device = max(matrices, weights) + attention
    device += _elementwise(part, positions, candidate, machine)
    return max(device, part.kernels * machine.launch_us * 1e-6)


def _elementwise(part: Part, positions: float, candidate: Candidate, machine: Machine) -> float:
    """Norms, rotations, gates and sums: bound by memory."""
    rate = machine.memory_bandwidth_gbs * 1e9 * machine.memory_efficiency
    moved = part.elementwise * positions * candidate.compute_bytes
    return moved / candidate.layout.tensor_parallel_size / rate


def _dp(candidate: Candidate) -> int:
    return candidate.layout.data_parallel_size
