"""Costs of a model in plain numbers for each of its parts: the planner's input.

The planner knows nothing of transformers or objectives. `pretrain.planning.plan` counts the weights
of a part, the tensors that it keeps for the backward pass and its operations. Here these numbers
are only divided by the degrees of a layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Split = Literal["tensor", "sequence", "whole"]
"""Kind of parallelism that splits a tensor: tensor, sequence (where it is on), or neither."""
Recompute = Literal["none", "selective", "full"]
Offload = Literal["none", "cpu"]


@dataclass(frozen=True)
class Weight:
    """Parameter of the whole model."""

    elements: int
    sharded: bool
    """True if tensor-parallel ranks hold a slice each."""
    group: int = 0
    """Optimizer group; padding is counted for each."""
    name: str = ""
    """Canonical name, by which an optimizer knows the state that it keeps; layers are all 0."""
    shape: tuple[int, ...] = ()
    """Whole shape, for the same."""

    def held(self, tensor_parallel_size: int) -> int:
        """Elements on one rank."""
        return self.elements // tensor_parallel_size if self.sharded else self.elements


@dataclass(frozen=True)
class Saved:
    """Tensor kept between forward and backward pass."""

    elements: float
    """Number for each position, or in all if `fixed`."""
    split: Split = "whole"
    size: int | None = None
    """Bytes of an element; None means those of the compute precision."""
    fixed: bool = False
    """True for a copy of a weight: independent of the number of positions."""
    gathered: bool = False
    """True if it is kept for whole sequences, although context parallelism splits them."""
    under: Literal["any", "context", "alone"] = "any"
    """Condition: kept always, only with context parallelism, or only without."""


@dataclass(frozen=True)
class Part:
    """Embedding, one layer, or final norm and head."""

    weights: tuple[Weight, ...]
    saved: tuple[Saved, ...] = ()
    """Tensors kept without recomputation."""
    kept: dict[Recompute, tuple[Saved, ...]] = field(default_factory=dict)
    """Rest of `saved` under each kind of recomputation; `saved` where none is named."""
    matrix_flops: float = 0.0
    """Forward operations of matrix products for each position, over all tensor-parallel ranks."""
    attention_flops: float = 0.0
    """Operations of attention products, which run at another rate, likewise."""
    elementwise: float = 0.0
    """Elements read and written outside of matrix products for each position."""
    kernels: int = 0
    """Kernels that the forward pass starts: small models wait for the host."""

    def kept_under(self, recompute: Recompute) -> tuple[Saved, ...]:
        """Tensors that stay until the backward pass."""
        return self.kept.get(recompute, self.saved)

    @property
    def elements(self) -> int:
        """Parameters of the whole part."""
        return sum(weight.elements for weight in self.weights)


@dataclass(frozen=True)
class Loss:
    """Way from logits to a loss: all at once, or in chunks that leave gradients behind."""

    vocabulary: int
    hidden_size: int
    chunk: int | None
    """Rows at once; 0 all of them, None as many as the limits below suggest."""
    whole_bytes: int
    """Float32 logits on a rank up to which all rows are taken at once."""
    chunk_bytes: int
    """Float32 logits of a chunk where they are not."""

    def rows_at_once(self, rows: float, tensor_parallel_size: int) -> float:
        """Rows of a chunk; `rows` where there is only one."""
        row_bytes = 4 * self.vocabulary / tensor_parallel_size
        chunk = self.chunk
        if chunk is None:
            whole = rows * row_bytes <= self.whole_bytes
            chunk = 0 if whole else max(1, int(self.chunk_bytes // row_bytes))
        return rows if chunk == 0 else min(rows, chunk)


@dataclass(frozen=True)
class ModelCost:
    """Model and the batch on which it is trained."""

    first: Part
    """Part of the first stage only: the embedding, and what conditions the layers."""
    layer: Part
    num_layers: int
    last: Part
    """Part of the last stage only, less its logits; its positions are the scored ones."""
    loss: Loss
    final: tuple[Saved, ...]
    """Tensors that the last stage keeps for each position, scored or not (its norm)."""
    layer_workspace: tuple[Saved, ...]
    """Gradients in memory at once while a layer is differentiated, for each position."""
    tied: tuple[Weight, ...]
    """Weights of `first` that the last stage of a pipeline holds too."""
    hidden_size: int
    """Elements that travel between layers for each position."""
    key_value_size: int
    """Elements of keys and values for each position (context parallelism sends them)."""
    seq_length: int
    positions_per_token: float
    head_share: float
    """Share of tokens whose logits are computed."""
    flops_per_token: float
    """Forward and backward operations that count as useful: the numerator of MFU."""
    stage_costs: tuple[tuple[float, ...], float]
    """Costs of layers and of the head by which the engine splits a pipeline."""
    tensor_parallel_sizes: dict[str, int]
    """Dimensions that tensor parallelism divides, by name."""
    key_value_heads: int
    """Number that tensor and context parallelism divide together."""

    extra_passes: float
    """Forward passes without gradient besides that of a step."""
    pipeline: bool
    """True if pipeline parallelism is allowed."""
    context: bool
    """True if context parallelism is allowed."""
    sequence: bool
    """True if sequence parallelism is allowed."""
    largest_zero_stage: int
    """Largest stage of ZeRO that is allowed."""
    teacher: bool
    """True if every rank holds its weights a second time, frozen."""
    vocabulary_elements: int
    """Parameters of embedding and head matrices."""

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without embedding and head matrices."""
        return self.parameters - self.vocabulary_elements

    @property
    def parameters(self) -> int:
        """Parameters of the whole model."""
        return self.first.elements + self.num_layers * self.layer.elements + self.last.elements
