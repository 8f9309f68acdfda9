"""Norm of the global gradient when every rank holds whole (data-parallel averaged) gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.layers import partition_dim
from parallel.layout.topology import Topology


def global_grad_norm(parameters: Sequence[Tensor], topology: Topology) -> Tensor:
    """Euclidean norm over all parameters, 0-d float32, equal on all ranks.

    Slices of tensor-parallel parameters are summed over their ranks, replicated parameters are
    counted once.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    assert len(grads) == len(parameters), "every parameter has a gradient here"
    norms = torch._foreach_norm(grads)
    nothing = norms[0].new_zeros((), dtype=torch.float32)
    if topology.tensor_parallel_size == 1:
        return _sum_of_squares(norms, nothing).sqrt()
    # Sorted on the host: to index by a mask a GPU would have to be waited for.
    sliced = [n for n, p in zip(norms, parameters, strict=True) if partition_dim(p) is not None]
    whole = [n for n, p in zip(norms, parameters, strict=True) if partition_dim(p) is None]
    split = _sum_of_squares(sliced, nothing)
    dist.all_reduce(split, group=topology.tp_group)
    return (split + _sum_of_squares(whole, nothing)).sqrt()


def _sum_of_squares(norms: Sequence[Tensor], nothing: Tensor) -> Tensor:
    """Sum of the squares of 0-d norms, 0-d float32; a fresh copy of `nothing` for none."""
    return torch.stack([nothing, *norms]).float().square().sum()


def clip_divisor(norm: Tensor, largest: float) -> Tensor:
    """Divisor that brings a gradient of this norm down to `largest`, as in DeepSpeed."""
    return ((norm + 1e-6) / largest).clamp(min=1.0)
