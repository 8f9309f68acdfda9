"""torch's FlexAttention: rules of columns on a GPU, without a mask tensor of pairs.

A block mask, built once a batch, says which tiles of 128 x 128 pairs are empty, full or in
between; only the last ask the rule itself, which is compiled into the kernel. On a CPU there is
neither a backward pass nor a gain, so it serves there to test the rule alone. torch's module is
imported when it is needed, because it loads the compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pretrain.batch import AttentionRule, keyed_hash

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Tensor:
    """Attention of q [s, b, heads, d] over k, v [s, b, groups, d]."""
    from torch.nn.attention.flex_attention import flex_attention

    batch_first = [x.permute(1, 2, 0, 3) for x in (q, k, v)]  # [b, heads, s, d]
    run: Any = _compiled(flex_attention) if q.is_cuda else flex_attention
    out: Tensor = run(*batch_first, block_mask=mask, enable_gqa=q.shape[2] != k.shape[2])
    return out.permute(2, 0, 1, 3)


def block_mask(rule: AttentionRule, batch_size: int, length: int, device: str) -> BlockMask | None:
    """Tiles of `rule`; None for bidirectional rules, which have no mask."""
    if rule.kind == "bidirectional":
        return None
    from torch.nn.attention.flex_attention import create_block_mask

    build = _compiled(create_block_mask) if device == "cuda" else create_block_mask
    if rule.kind == "causal":
        return build(causal, None, None, length, length, device=device)
    return build(mask_function(rule), batch_size, None, length, length, device=device)


def causal(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Mask function of rules of kind `causal`."""
    return query >= key


def mask_function(rule: AttentionRule) -> MaskFunction:
    """Rule of columns as a function of (row, head, query, key), equal to `rule.mask()`."""
    assert rule.columns is not None
    segment, group, query_rank, key_rank, *hiding = rule.columns.unbind()

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment[b, query] == segment[b, key]
        together = group[b, query] == group[b, key]
        return same & (together | (key_rank[b, key] < query_rank[b, query]))

    if not hiding:
        return visible
    threshold, salt = hiding

    def visible_less_hidden(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = segment[b, query] == segment[b, key]
        together = group[b, query] == group[b, key]
        kept = keyed_hash(salt[b, query].to(torch.int64), key) >= threshold[b, query]
        return same & (together | ((key_rank[b, key] < query_rank[b, query]) & kept))

    return visible_less_hidden


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function once for the process; shapes that vary become symbols at the second."""
    compiled: Callable[..., Any] = torch.compile(function)
    return compiled
