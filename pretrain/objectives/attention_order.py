"""Who reads whom, for families that read in some order: one generator for all their masks.

Every mask here follows from an `order` [b, s], a rank for each position (equal ranks form a block):

    ordered   a position reads its own block and everything of lower rank
    pair      [noisy | clean], both in that order: a noisy block reads itself and the clean blocks
              before it, a clean block reads itself and the clean blocks before it

Blocks l // L' give block diffusion (BD3-LM, arXiv 2503.09573), a random order gives the diffusion
phase of Eso-LM (arXiv 2506.01928), a pair of single tokens in that order its sequential phase.
Invalid positions read and are read by nobody else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pretrain.batch import AttentionRule, CleanBatch

NEVER = 1 << 30
"""A `write` above every `read`: the key is read inside its group only."""


@dataclass(frozen=True)
class Columns:
    """Columns of an attention rule, each int64 [b, s']."""

    segment: Tensor
    group: Tensor
    read: Tensor
    write: Tensor

    def rule(self) -> AttentionRule:
        """As the model takes it."""
        return AttentionRule.from_columns(self.segment, self.group, self.read, self.write)


def ordered(clean: CleanBatch, order: Tensor) -> Columns:
    """Columns of the rule "ordered" for `order` int64 [b, s], 0 <= order < s."""
    s = order.shape[1]
    alone = s + torch.arange(s).expand_as(order)
    group = torch.where(clean.valid, order, alone)
    read = torch.where(clean.valid, order, 0)
    write = torch.where(clean.valid, order, NEVER)
    return Columns(clean.segment.long(), group, read, write)


def pair(clean: CleanBatch, order: Tensor) -> Columns:
    """Columns [b, 2 s] of the rule "pair": the noisy half first, then the clean half."""
    one = ordered(clean, order)
    s = order.shape[1]
    return Columns(
        segment=one.segment.repeat(1, 2),
        group=torch.cat((one.group, one.group + 2 * s), dim=1),
        read=one.read.repeat(1, 2),
        write=torch.cat((torch.full_like(one.write, NEVER), one.write), dim=1),
    )


def unread(like: Columns) -> Columns:
    """Columns of positions that only fill up a row: each reads itself."""
    alone = torch.arange(like.group.shape[1]).expand_as(like.group)
    nothing = torch.zeros_like(like.group)
    return Columns(nothing, alone, nothing, torch.full_like(like.write, NEVER))


def apart(*parts: Columns) -> Columns:
    """Parts side by side in one row, none of which reads another."""
    count = len(parts)
    return Columns(
        segment=torch.cat([p.segment * count + i for i, p in enumerate(parts)], dim=1),
        group=torch.cat([p.group for p in parts], dim=1),
        read=torch.cat([p.read for p in parts], dim=1),
        write=torch.cat([p.write for p in parts], dim=1),
    )


def choose(condition: Tensor, yes: Columns, no: Columns) -> Columns:
    """Row by row: `yes` where `condition` [b] is True, else `no`."""
    c = condition[:, None]
    return Columns(
        *(
            torch.where(c, getattr(yes, name), getattr(no, name))
            for name in ("segment", "group", "read", "write")
        )
    )
