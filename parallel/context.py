"""Context parallelism: every sequence is split over ranks, attention over heads instead (Ulysses).

Each rank embeds and transforms its slice of the positions. DeepSpeed's DistributedAttention turns
slices into whole sequences of a share of the heads and back, four all-to-alls a layer, so any
attention rule works unchanged. At the end the hidden states are gathered and every rank scores its
share of the targets. All functions are identities on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from parallel.layout.topology import Topology


def local_positions(x: Tensor, dim: int, topology: Topology) -> Tensor:
    """This rank's slice of the sequence dimension `dim`."""
    if topology.context_parallel_size == 1:
        return x
    return x.chunk(topology.context_parallel_size, dim)[topology.cp_rank]


def local_targets(x: Tensor, topology: Topology) -> Tensor:
    """Every cp-th row of x [n, ...]: the targets that this rank scores."""
    if topology.context_parallel_size == 1:
        return x
    return x[topology.cp_rank :: topology.context_parallel_size]


def gather_positions(x: Tensor, topology: Topology) -> Tensor:
    """Whole sequences [s, ...] from slices [s/cp, ...]; gradients of all ranks are summed."""
    if topology.context_parallel_size == 1:
        return x
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    whole: Tensor = gather_from_sequence_parallel_region(x, group=topology.cp_group)
    return whole


def sum_over_context(x: Tensor, topology: Topology) -> Tensor:
    """Sum of x over the ranks that share a sequence; carries no gradient."""
    if topology.context_parallel_size > 1:
        dist.all_reduce(x, group=topology.cp_group)
    return x


def spread_attention(attend: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    """`attend(q, k, v, *rest)` on slices [s/cp, b, heads, d], computed on whole sequences."""
    if topology.context_parallel_size == 1:
        return attend
    from deepspeed.sequence.layer import DistributedAttention

    spread = DistributedAttention(attend, topology.cp_group)

    def attend_spread(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        batch_dim, rotary = 1, None
        out: Tensor = spread(q, k, v, batch_dim, rotary, *rest)
        return out

    return attend_spread
