"""Candidate of the planner: a layout and the other settings that decide memory and time."""

from __future__ import annotations

from dataclasses import dataclass

from parallel.engine.optimizer import OptimizerSpec
from parallel.layout.rules import Layout, effective_stage
from parallel.planner.costs import Offload, Recompute


@dataclass(frozen=True)
class Candidate:
    """Way to run a step."""

    layout: Layout
    zero_stage: int
    micro_batch_size: int
    """Sequences per rank and forward pass."""
    num_microbatches: int
    optimizer: OptimizerSpec
    precision: str = "bfloat16"
    recompute: Recompute = "none"
    recompute_layers: int | None = None
    """Layers of each stage that `recompute` concerns; None for all."""
    averages: int = 0
    """Float32 averages of the weights that are kept (EMA), sharded as the optimizer."""
    offload: Offload = "none"
    """`cpu`: optimizer state in host memory, at stage 3 also weights between their uses."""
    overlap_comm: bool | None = None
    """Reduction during the backward pass, as in `parallel.engine.settings`."""
    reduce_bucket_size: int = 50_000_000
    """Elements of a gradient reduction, as in `parallel.engine.settings`."""
    whole_below: int = 100_000
    """Stage 3 keeps smaller parameters whole on every rank, as in `parallel.engine.settings`."""

    @property
    def compute_bytes(self) -> int:
        """Bytes of a weight or activation in the forward pass."""
        return 2 if self.precision == "bfloat16" else 4

    @property
    def shards(self) -> int:
        """Ranks over which ZeRO shards: data x context."""
        return self.layout.data_parallel_size * self.layout.context_parallel_size

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step."""
        return self.micro_batch_size * self.num_microbatches * self.layout.data_parallel_size

    @property
    def offloads(self) -> bool:
        """True if the optimizer runs in host memory."""
        return self.offload != "none"

    @property
    def effective_stage(self) -> int:
        """ZeRO stage that the engine really runs."""
        return effective_stage(self.layout, self.zero_stage, self.precision, self.offload)
