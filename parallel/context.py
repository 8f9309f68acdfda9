"""Context parallelism: every sequence is cut over ranks, attention over heads instead (Ulysses).

Each rank embeds and transforms its own stretch of positions. DeepSpeed's DistributedAttention turns
stretches into whole sequences of a share of the heads and back, four all-to-alls a layer, so any
attention rule works unchanged. At the end the hidden states are gathered and every rank scores its
share of the targets. All functions are identities on one context-parallel rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


def context_size() -> int:
    """Ranks that share every sequence."""
    from megatron.core import parallel_state

    return int(parallel_state.get_context_parallel_world_size())


def context_rank() -> int:
    """This rank's number among them."""
    from megatron.core import parallel_state

    return int(parallel_state.get_context_parallel_rank())


def own_positions(x: Tensor, dim: int) -> Tensor:
    """This rank's stretch of the sequence dimension `dim`."""
    if context_size() == 1:
        return x
    from megatron.core import parallel_state

    return x.chunk(context_size(), dim)[parallel_state.get_context_parallel_rank()]


def own_share(x: Tensor) -> Tensor:
    """Every cp-th row of x [n, ...]: the targets that this rank scores."""
    if context_size() == 1:
        return x
    from megatron.core import parallel_state

    return x[parallel_state.get_context_parallel_rank() :: context_size()]


def gather_positions(x: Tensor) -> Tensor:
    """Whole sequences [s, ...] from stretches [s/cp, ...]; gradients of all ranks are summed."""
    if context_size() == 1:
        return x
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import gather_from_sequence_parallel_region

    group = parallel_state.get_context_parallel_group()
    whole: Tensor = gather_from_sequence_parallel_region(x, group=group)
    return whole


def sum_over_context(x: Tensor) -> Tensor:
    """Sum of x over the ranks that share a sequence; carries no gradient."""
    if context_size() > 1:
        from megatron.core import parallel_state

        dist.all_reduce(x, group=parallel_state.get_context_parallel_group())
    return x


def spread_attention(attend: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`attend(q, k, v, *rest)` on stretches [s/cp, b, heads, d], computed on whole sequences."""
    if context_size() == 1:
        return attend
    from deepspeed.sequence.layer import DistributedAttention
    from megatron.core import parallel_state

    spread = DistributedAttention(attend, parallel_state.get_context_parallel_group())

    def attend_spread(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        batch_dim, rotary = 1, None
        out: Tensor = spread(q, k, v, batch_dim, rotary, *rest)
        return out

    return attend_spread
