"""Attention rules of families that process tokens in an order: one generator for all of them.

Every rule here follows from `order` [b, s], a rank for each position. Positions of equal rank form
a block.

    ordered   a position attends to its block and to all positions of lower rank
    pair      [noisy | clean], both halves in that order: a noisy block attends to itself and to the
              clean blocks before it, a clean block to itself and to the clean blocks before it

For example the rule `pair` of two blocks, 0 before 1 (a row for each query, a column for each key):

                noisy 0   noisy 1   clean 0   clean 1
    noisy 0        x
    noisy 1                  x         x
    clean 0                            x
    clean 1                            x         x

Blocks l // L' give block diffusion (BD3-LM, arXiv 2503.09573), a random order gives the diffusion
phase of Eso-LM (arXiv 2506.01928), a pair of single tokens in that order its sequential phase.
An invalid position attends to itself only, and no other position attends to it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.batch import AttentionRule, CleanBatch

NEVER = 1 << 30
"""A `key_rank` above every `query_rank`: only the key's group attends to it."""


@dataclass(frozen=True)
class Columns:
    """Columns of an `AttentionRule`, each int64 [b, s']."""

    segment: Tensor
    group: Tensor
    query_rank: Tensor
    key_rank: Tensor

    def rule(self) -> AttentionRule:
        """Build the rule that the model takes."""
        return AttentionRule.from_columns(self.segment, self.group, self.query_rank, self.key_rank)


def ordered(clean: CleanBatch, order: Tensor) -> Columns:
    """Columns of the rule "ordered" for `order` int64 [b, s], 0 <= order < s."""
    s = order.shape[1]
    # Groups from s on have one member each: an invalid position attends to itself only.
    alone = s + torch.arange(s).expand_as(order)
    group = torch.where(clean.valid, order, alone)
    query_rank = torch.where(clean.valid, order, 0)
    key_rank = torch.where(clean.valid, order, NEVER)
    return Columns(clean.segment.long(), group, query_rank, key_rank)


def pair(clean: CleanBatch, order: Tensor) -> Columns:
    """Columns [b, 2 s] of the rule "pair": the noisy half first, then the clean half."""
    one = ordered(clean, order)
    s = order.shape[1]
    return Columns(
        segment=one.segment.repeat(1, 2),
        # Groups of the two halves differ, so that a noisy block and its clean copy are separate.
        group=torch.cat((one.group, one.group + 2 * s), dim=1),
        query_rank=one.query_rank.repeat(1, 2),
        # Only clean keys are visible outside their group.
        key_rank=torch.cat((torch.full_like(one.key_rank, NEVER), one.key_rank), dim=1),
    )


def isolated(like: Columns) -> Columns:
    """Columns of positions that only fill up a row: each attends to itself."""
    alone = torch.arange(like.group.shape[1]).expand_as(like.group)
    nothing = torch.zeros_like(like.group)
    return Columns(nothing, alone, nothing, torch.full_like(like.key_rank, NEVER))


def concatenate(*parts: Columns) -> Columns:
    """Columns of the parts side by side in one row; no part attends to another."""
    count = len(parts)
    return Columns(
        # Part i takes the segments that are i modulo the number of parts.
        segment=torch.cat([p.segment * count + i for i, p in enumerate(parts)], dim=1),
        group=torch.cat([p.group for p in parts], dim=1),
        query_rank=torch.cat([p.query_rank for p in parts], dim=1),
        key_rank=torch.cat([p.key_rank for p in parts], dim=1),
    )


def select_rows(condition: Tensor, yes: Columns, no: Columns) -> Columns:
    """Rows of `yes` where `condition` [b] is True, else of `no`."""
    c = condition[:, None]
    return Columns(
        *(
            torch.where(c, getattr(yes, name), getattr(no, name))
            for name in ("segment", "group", "query_rank", "key_rank")
        )
    )
