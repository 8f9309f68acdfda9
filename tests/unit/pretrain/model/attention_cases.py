"""Attention rules as the objectives make them, and what each means, pair by pair in Python."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pretrain.batch import AttentionRule, CleanBatch
from pretrain.config.objectives import objectives
from pretrain.noise.key import NoiseKey
from pretrain.objectives import Objective, build_objective
from pretrain.vocabulary import TokenSpace

SPACE = TokenSpace(60, 64, 0, 1, 2, (0, 1, 3))
ROWS, LENGTH = 3, 37
"""An odd length: no tile of any kernel divides it."""


def clean_batch(documents: bool, short: bool) -> CleanBatch:
    """Random tokens; with `documents` several in a row, with `short` a tail that is not valid."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randint(4, 60, (ROWS, LENGTH), generator=g)
    valid = torch.ones_like(tokens, dtype=torch.bool)
    if short:
        valid[1, 20:], valid[2] = False, False
    segment = torch.zeros_like(tokens)
    if documents:
        segment = (torch.rand(ROWS, LENGTH, generator=g) < 0.1).cumsum(dim=1)
    return CleanBatch(
        tokens=torch.where(valid, tokens, SPACE.pad_id),
        position=torch.arange(ROWS),
        segment=segment.to(torch.int32),
        valid=valid,
        all_valid=not short,
        one_segment=not documents,
    )


def family(name: str, **fields: Any) -> Objective:
    """An objective on the small vocabulary."""
    return build_objective(objectives.make(name=name, time_window=ROWS, **fields), SPACE)


def rule_of(
    name: str, documents: bool = False, short: bool = False, **fields: Any
) -> AttentionRule:
    """The rule of a training batch of objective `name`."""
    clean = clean_batch(documents, short)
    return family(name, **fields).corrupt(clean, NoiseKey(3, clean.position)).attention


def cases() -> dict[str, tuple[str, AttentionRule]]:
    """(kind that is expected, rule) by name."""
    return {
        "causal": ("causal", rule_of("autoregressive")),
        "bidirectional": ("bidirectional", rule_of("masked")),
        "causal documents": ("documents", rule_of("autoregressive", documents=True)),
        "causal documents, short": ("documents", rule_of("autoregressive", True, True)),
        "documents": ("documents", rule_of("masked", documents=True)),
        "documents, short": ("documents", rule_of("masked", True, True)),
        "short rows": ("documents", rule_of("uniform", short=True)),
        "block": ("columns", rule_of("block", block_size=4)),
        "block, documents, short": ("columns", rule_of("block", True, True, block_size=5)),
        "esoteric": ("columns", rule_of("esoteric", alpha0=0.5)),
        "esoteric, diffusion": ("columns", rule_of("esoteric", alpha0=1.0)),
        "hidden from queries": ("columns", rule_of("autoregressive", hide="queries")),
        "hidden tokens": ("columns", rule_of("autoregressive", True, hide="tokens")),
        "orders": ("causal", rule_of("autoregressive", orders=3)),
    }


def _mixed(salt: int, key: int) -> int:
    """MurmurHash3's finaliser on 32-bit words, less the lowest bit."""
    h = (salt + (key + 1) * 0x9E3779B9) % 2**32
    h = (h ^ h >> 16) * 0x85EBCA6B % 2**32
    h = (h ^ h >> 13) * 0xC2B2AE35 % 2**32
    return (h ^ h >> 16) >> 1


def readable(rule: AttentionRule, rows: int, length: int) -> np.ndarray:
    """bool [b, s, s] from the definition of a rule, one pair at a time."""
    if rule.kind in ("causal", "bidirectional"):
        whole = np.ones((length, length), dtype=bool)
        return np.stack([np.tril(whole) if rule.kind == "causal" else whole] * rows)
    assert rule.columns is not None
    segment, group, read, write, *hiding = rule.columns.tolist()
    out = np.zeros((rows, length, length), dtype=bool)
    for b, q, k in np.ndindex(out.shape):
        earlier = write[b][k] < read[b][q]
        if hiding:
            earlier = earlier and _mixed(hiding[1][b][q], k) >= hiding[0][b][q]
        together = group[b][q] == group[b][k]
        out[b, q, k] = segment[b][q] == segment[b][k] and (together or earlier)
    return out


def reference(q: Tensor, k: Tensor, v: Tensor, mask: np.ndarray) -> Tensor:
    """Softmax attention in the dtype of q [s, b, heads, d]; k, v [s, b, groups, d], a group shared
    by neighbouring heads; mask bool [b, s, s]."""
    share = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(share, dim=2) for x in (k, v))
    score = torch.einsum("qbhd,kbhd->bhqk", q, k) / q.shape[-1] ** 0.5
    score = score.masked_fill(~torch.as_tensor(mask, device=q.device)[:, None], -torch.inf)
    return torch.einsum("bhqk,kbhd->qbhd", score.softmax(dim=-1), v)


def inputs(rule: AttentionRule, heads: int, groups: int, head_size: int) -> list[Tensor]:
    """Random float64 q, k, v that `rule` fits, and a gradient of the output."""
    length = LENGTH if rule.columns is None else rule.columns.shape[2]
    g = torch.Generator().manual_seed(11)
    sizes = (heads, groups, groups, heads)
    every = [
        torch.randn(length, ROWS, n, head_size, generator=g, dtype=torch.float64) for n in sizes
    ]
    return [*(x.requires_grad_() for x in every[:3]), every[3]]
