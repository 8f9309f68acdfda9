"""Additions to megatron-core's tensor-parallel layers, needed without megatron's optimizer.

megatron sums partial gradients of replicated weights after the backward pass, in a function that
DeepSpeed never calls. Here the sum is part of the autograd graph, so that no engine can leave it
out. All functions are identities on one tensor-parallel rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from parallel.layout.topology import Topology


def parallel_config(topology: Topology) -> Any:
    """ModelParallelConfig of megatron for this layout: float32 parameters, no fused extensions.

    Weights are allocated on the CPU. The model draws them after construction, as a function of
    their names; megatron's initialisation is off.
    """
    from megatron.core.model_parallel_config import ModelParallelConfig

    return ModelParallelConfig(
        tensor_model_parallel_size=topology.tensor_parallel_size,
        context_parallel_size=topology.context_parallel_size,
        sequence_parallel=topology.sequence_parallel,
        use_cpu_initialization=True,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
        params_dtype=torch.float32,
    )


def sum_gradient(weight: Tensor, topology: Topology) -> Tensor:
    """Return `weight` unchanged; its gradient is summed over the tensor-parallel ranks.

    For a replicated weight of which every tensor-parallel rank sees only a part of the work: query
    and key norms (a rank has its heads only), anything applied to a sequence shard.
    """
    if topology.tensor_parallel_size == 1:
        return weight
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    summed: Tensor = copy_to_tensor_model_parallel_region(weight, group=topology.tp_group)
    return summed


def scatter_sequence(x: Tensor, topology: Topology) -> Tensor:
    """This rank's shard [s/tp, ...] of all positions [s, ...]; gradients are gathered."""
    from megatron.core.tensor_parallel import scatter_to_sequence_parallel_region

    shard: Tensor = scatter_to_sequence_parallel_region(x, group=topology.tp_group)
    return shard


def gather_sequence(x: Tensor, topology: Topology) -> Tensor:
    """All positions [s, ...] from sequence shards [s/tp, ...]; each rank gets its gradient back.

    For a following layer whose gradient is whole on every tensor-parallel rank, such as a
    column-parallel layer built without sequence parallelism.
    """
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole: Tensor = gather_from_sequence_parallel_region(
        x, tensor_parallel_output_grad=False, group=topology.tp_group
    )
    return whole


def mark_tensor_parallel(parameter: nn.Parameter, dim: int) -> nn.Parameter:
    """Declare that `parameter` is this rank's slice, along `dim`, of a larger one; returns it.

    Without the mark the gradient norm counts the slice of one rank only, with no error, and the
    checkpoint would keep that slice as if it were the whole.
    """
    from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes

    for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
        if hasattr(parameter, name):
            delattr(parameter, name)
    set_tensor_model_parallel_attributes(parameter, True, dim, 1)
    return parameter


def mark_parallel_layers(module: nn.Module) -> None:
    """Mark the slices inside every megatron layer of `module`; idempotent.

    megatron marks weights only where it initialises them itself.
    """
    from megatron.core.tensor_parallel import (
        ColumnParallelLinear,
        RowParallelLinear,
        VocabParallelEmbedding,
    )

    for layer in module.modules():
        if isinstance(layer, ColumnParallelLinear | VocabParallelEmbedding):
            split = {"weight": 0, "bias": 0}
        elif isinstance(layer, RowParallelLinear):
            split = {"weight": 1}
        else:
            continue
        for name, dim in split.items():
            parameter = getattr(layer, name, None)
            if parameter is not None:
                mark_tensor_parallel(parameter, dim)


def partition_dim(parameter: Tensor) -> int | None:
    """Dimension along which the parameter is split over tensor-parallel ranks; None: replicated."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return None
    assert getattr(parameter, "partition_stride", 1) == 1, "strided slices do not concatenate"
    return int(parameter.partition_dim)  # type: ignore[attr-defined]


def own_shape(parameter: Tensor) -> list[int]:
    """Shape of this rank's slice; ZeRO 3, while it holds a parameter in pieces, shows it empty."""
    return list(getattr(parameter, "ds_shape", parameter.shape))


def whole_shape(parameter: Tensor, tensor_parallel_size: int) -> list[int]:
    """Shape of the parameter of which this rank holds a slice."""
    shape = own_shape(parameter)
    dim = partition_dim(parameter)
    if dim is not None:
        shape[dim] *= tensor_parallel_size
    return shape
