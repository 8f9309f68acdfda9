"""Memory of every rank: state, activations and temporary tensors, at the peak.

The peak is taken to be the start of a backward pass: all activations of the micro-batches in
flight, the gradients accumulated so far, and the gradient of the logits or of one layer. All ranks
of a stage need the same; the stage that needs most decides whether a layout fits.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from parallel.planner.candidate import Candidate
from parallel.planner.costs import ModelCost, Saved, Weight
from parallel.planner.state import StateBytes, mean_state_bytes, state_bytes


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on each rank of one pipeline stage."""

    state: StateBytes
    offloaded: bool
    """True if optimizer and averages are in host memory and not in the sum."""
    teacher: int
    """Weights of a frozen copy."""
    activations: float
    """Kept for the backward pass, over all micro-batches in flight."""
    activations_without_recompute: float
    logits: float
    """Logits and their gradient."""
    workspace: float
    """Gradients and recomputed activations of one layer."""

    @property
    def total(self) -> float:
        """Sum at the peak."""
        state = self.state
        held = state.parameters + state.gradients + self.teacher
        if not self.offloaded:
            held += state.optimizer + state.averages
        return held + self.temporary

    @property
    def temporary(self) -> float:
        """Bytes that are not held through the whole step: of backward pass or update."""
        backward = self.activations + max(self.logits, self.workspace) + self.state.gathered
        return max(backward, self.state.update)


@dataclass(frozen=True)
class StageParts:
    """Parts of the model that one stage holds."""

    model: ModelCost
    first: bool
    last: bool
    num_layers: int
    _held: dict[int, tuple[int, int]] = field(default_factory=dict, compare=False, repr=False)
    _states: dict[Candidate, StateBytes] = field(default_factory=dict, compare=False, repr=False)
    _means: dict[object, float] = field(default_factory=dict, compare=False, repr=False)

    def weights(self) -> Iterable[Weight]:
        """Every parameter, a tied one once."""
        if self.first:
            yield from self.model.first.weights
        for _ in range(self.num_layers):
            yield from self.model.layer.weights
        if self.last:
            yield from self.model.last.weights
            if not self.first:
                yield from self.model.tied

    def held(self, tensor_parallel_size: int) -> tuple[int, int]:
        """Elements and tensors of a rank; counted once."""
        if tensor_parallel_size not in self._held:
            sizes = [weight.held(tensor_parallel_size) for weight in self.weights()]
            self._held[tensor_parallel_size] = sum(sizes), len(sizes)
        return self._held[tensor_parallel_size]

    def state(self, candidate: Candidate) -> StateBytes:
        """Bytes of weights, optimizer and gradients; counted once for all splits of a batch and
        kinds of recomputation, on which they do not depend."""
        key = replace(
            candidate,
            micro_batch_size=1,
            num_microbatches=1,
            recompute="none",
            recompute_layers=None,
        )
        if key not in self._states:
            self._states[key] = state_bytes(self.weights(), key)
        return self._states[key]

    def mean_state(self, candidate: Candidate) -> float:
        """Bytes of optimizer state for each element; counted once."""
        key = (candidate.layout.tensor_parallel_size, candidate.optimizer)
        if key not in self._means:
            self._means[key] = mean_state_bytes(self.weights(), candidate)
        return self._means[key]

    def teacher(self, candidate: Candidate) -> int:
        """Bytes of a frozen copy of the weights."""
        if not self.model.teacher:
            return 0
        elements, _ = self.held(candidate.layout.tensor_parallel_size)
        return candidate.compute_bytes * elements

    def kept(self, candidate: Candidate) -> float:
        """Bytes that the forward pass of one micro-batch leaves for its backward pass."""
        positions = layer_positions(self.model, candidate)
        concerned = self.num_layers
        if candidate.recompute_layers is not None:
            concerned = min(concerned, candidate.recompute_layers)
        layer = self.model.layer
        total = concerned * saved_bytes(layer.kept_under(candidate.recompute), positions, candidate)
        total += (self.num_layers - concerned) * saved_bytes(layer.saved, positions, candidate)
        if self.first:
            total += saved_bytes(self.model.first.saved, positions, candidate)
        if self.last:
            total += saved_bytes(self.model.final, positions, candidate)
            rows = scored_rows(self.model, candidate)
            total += saved_bytes(self.model.last.saved, rows, candidate)
            total += self._loss_kept(rows, candidate)
        return total

    def _loss_kept(self, rows: float, candidate: Candidate) -> float:
        """Logits, or the gradient of the head's weight if they go through in chunks."""
        loss, tp = self.model.loss, candidate.layout.tensor_parallel_size
        whole = loss.rows_at_once(rows, tp) == rows
        logits = (2 if self.model.teacher else 1) * rows  # the teacher's are compared with them
        return 4 * loss.vocabulary / tp * (logits if whole else loss.hidden_size)

    def logits(self, candidate: Candidate) -> float:
        """Bytes besides the activations when the loss is differentiated."""
        if not self.last:
            return 0.0
        loss, tp = self.model.loss, candidate.layout.tensor_parallel_size
        rows = scored_rows(self.model, candidate)
        chunk, columns = loss.rows_at_once(rows, tp), loss.vocabulary / tp
        gradient = chunk * columns * (4 + candidate.compute_bytes)
        if chunk == rows:
            return gradient
        # Logits of one chunk (and the teacher's), and what it adds to the gradient of the weight.
        logits = 4 * chunk * (2 if self.model.teacher else 1)
        return gradient + columns * (logits + candidate.compute_bytes * loss.hidden_size)

    def workspace(self, candidate: Candidate) -> float:
        """Bytes besides the activations when a layer is differentiated."""
        positions = layer_positions(self.model, candidate)
        layer = self.model.layer
        whole = saved_bytes(layer.saved, positions, candidate)
        again = whole - saved_bytes(layer.kept_under(candidate.recompute), positions, candidate)
        return again + saved_bytes(self.model.layer_workspace, positions, candidate)


def layer_positions(model: ModelCost, candidate: Candidate) -> float:
    """Positions that one rank takes through a layer for a micro-batch (tensor ranks share them)."""
    cp = candidate.layout.context_parallel_size
    length = model.seq_length * model.positions_per_token
    return candidate.micro_batch_size * length / cp


def scored_rows(model: ModelCost, candidate: Candidate) -> float:
    """Positions whose logits one rank computes."""
    cp = candidate.layout.context_parallel_size
    return candidate.micro_batch_size * model.seq_length * model.head_share / cp


def saved_bytes(saved: Iterable[Saved], positions: float, candidate: Candidate) -> float:
    """Bytes on one rank of tensors over `positions`."""
    layout, size, total = candidate.layout, candidate.compute_bytes, 0.0
    tp, cp = layout.tensor_parallel_size, layout.context_parallel_size
    other = "alone" if cp > 1 else "context"
    for tensor in saved:
        if tensor.under == other:
            continue
        count = tensor.elements * (1.0 if tensor.fixed else positions)
        if tensor.gathered:
            count *= cp
        if tensor.split == "tensor" or (tensor.split == "sequence" and layout.sequence_parallel):
            count /= tp
        total += count * (tensor.size or size)
    return total


def stage_memory(
    model: ModelCost, candidate: Candidate, stage: StageParts, behind: int
) -> MemoryPlan:
    """Memory of a rank of `stage`; `behind` is the number of stages after it."""
    in_flight = min(candidate.num_microbatches, behind + 1)
    whole = replace(candidate, recompute="none", recompute_layers=None)
    return MemoryPlan(
        state=stage.state(candidate),
        offloaded=candidate.offloads,
        teacher=stage.teacher(candidate),
        activations=in_flight * stage.kept(candidate),
        activations_without_recompute=in_flight * stage.kept(whole),
        logits=stage.logits(candidate),
        workspace=stage.workspace(candidate),
    )
