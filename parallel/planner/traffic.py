"""Messages of a rank in a step, by kind of parallelism, and the time they take.

Volumes are bytes that one rank sends, as ring algorithms do it: (n - 1) / n of the tensor for a
gather or a reduce-scatter, twice that for an all-reduce, (n - 1) / n of it for an all-to-all.
Ranks are placed as `parallel.layout.topology` places them: tensor ranks are neighbours, then
context, data and pipeline.
"""

from __future__ import annotations

from dataclasses import dataclass

from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost
from parallel.planner.machine import Machine
from parallel.planner.memory import StageParts, layer_positions, scored_rows


@dataclass(frozen=True)
class Messages:
    """Bytes that one rank sends, and in how many messages."""

    bytes: float = 0.0
    count: float = 0.0

    def __add__(self, other: Messages) -> Messages:
        return Messages(self.bytes + other.bytes, self.count + other.count)

    def __mul__(self, factor: float) -> Messages:
        return Messages(self.bytes * factor, self.count * factor)


def tensor_messages(model: ModelCost, candidate: Candidate, stage: StageParts) -> Messages:
    """Tensor (and sequence) parallelism, forward and backward of one micro-batch."""
    tp = candidate.layout.tensor_parallel_size
    if tp == 1:
        return Messages()
    ring = (tp - 1) / tp
    size = candidate.compute_bytes * model.hidden_size
    hidden = layer_positions(model, candidate) * size * ring
    # Forward: two all-reduces, or as many gathers and scatters; backward the same, and with
    # sequence parallelism both inputs are gathered once more for the weights' gradients.
    sequence = candidate.layout.sequence_parallel
    per_layer = Messages(10 * hidden, 10) if sequence else Messages(8 * hidden, 4)
    total = per_layer * stage.num_layers
    forward_again = Messages(4 * hidden, 4 if sequence else 2)
    total += forward_again * recomputed_layers(candidate, stage)
    if stage.first:
        total += Messages(2 * hidden, 2)
    if stage.last:
        total += Messages(2 * scored_rows(model, candidate) * size * ring + 2 * hidden, 5)
    return total


def context_messages(model: ModelCost, candidate: Candidate, stage: StageParts) -> Messages:
    """Context parallelism (all-to-alls around attention), forward and backward."""
    cp = candidate.layout.context_parallel_size
    if cp == 1:
        return Messages()
    share = (cp - 1) / cp * candidate.compute_bytes * layer_positions(model, candidate)
    width = (2 * model.hidden_size + model.key_value_size) / candidate.layout.tensor_parallel_size
    passes = 2 * stage.num_layers + recomputed_layers(candidate, stage)
    total = Messages(share * width, 4) * passes
    if stage.last:
        total += Messages(2 * (cp - 1) * candidate.compute_bytes * model.hidden_size, 2) * (
            layer_positions(model, candidate)
        )
    return total


def pipeline_messages(model: ModelCost, candidate: Candidate) -> Messages:
    """Hidden states to the next stage and their gradients back, one micro-batch."""
    layout = candidate.layout
    if layout.pipeline_parallel_size == 1:
        return Messages()
    parts = layout.tensor_parallel_size if layout.sequence_parallel else 1
    size = candidate.compute_bytes * model.hidden_size / parts
    return Messages(2 * layer_positions(model, candidate) * size, 2)


def data_messages(candidate: Candidate, elements: int, tensors: int) -> Messages:
    """Gradients and weights of `elements` parameters in `tensors`, one optimizer step of a rank."""
    shards, stage = candidate.shards, candidate.effective_stage
    if shards == 1:
        return Messages()
    ring = (shards - 1) / shards * elements
    size, bucket = candidate.compute_bytes, candidate.reduce_bucket_size
    messages = elements / bucket + 1
    if stage in (0, 1):  # all-reduce in float32 once a step, then the updated weights
        weights = Messages(size * ring, messages) if stage else Messages()
        return Messages(2 * 4 * ring, messages) + weights
    count = candidate.num_microbatches
    if stage == 2:  # DeepSpeed all-reduces buckets in every backward pass
        return Messages(2 * 4 * ring, messages) * count + Messages(size * ring, messages)
    # Stage 3: every tensor for both passes, gradients scattered.
    gathers = Messages(size * ring, tensors) * 2
    return (gathers + Messages(4 * ring, messages)) * count


def recomputed_layers(candidate: Candidate, stage: StageParts) -> int:
    """Layers whose whole forward pass runs again."""
    if candidate.recompute != "full":
        return 0
    limit = candidate.recompute_layers
    return stage.num_layers if limit is None else min(limit, stage.num_layers)


def seconds(messages: Messages, machine: Machine, ranks: int, stride: int) -> float:
    """Time of collectives over `ranks` that stand `stride` apart, without any overlap.

    Inside a node they have NVLink; across nodes the `stride` groups that begin on one node share
    its network.
    """
    if messages.count == 0 or ranks == 1:
        return 0.0
    if ranks * stride <= machine.gpus_per_node:
        rate = machine.nvlink_gbs
    else:
        rate = min(machine.nvlink_gbs, machine.network_gbs / min(stride, machine.gpus_per_node))
    useful = rate * 1e9 * machine.network_efficiency
    return messages.bytes / useful + messages.count * machine.latency_us * 1e-6
