"""Sums over the vocabulary as plain formulas that torch's compiler fuses.

In bfloat16 a loss of single operations writes a float32 copy of the logits and two or three further
tensors of that size. A compiled loss reads the logits in the precision of the projection and writes
their gradient, and no other tensor of that size; its arithmetic is still float32. It costs a
compilation in the first step, and another when the number of rows begins to vary.

The projection is not compiled, nor is the way in which `chunked` computes gradients in the forward
pass: no logit is computed twice, a row may have any weight, and an excluded column keeps its -inf.
Compiled losses are for training only; bounds are always evaluated by `VocabChunk`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pretrain.model.vocab import VocabChunk, widen


class CompiledChunk(VocabChunk):
    """The outputs of `chunk`, its training losses compiled; one tensor-parallel rank only."""

    def __init__(self, chunk: VocabChunk) -> None:
        super().__init__(chunk.outputs, chunk.topology)
        assert self.tp_size == 1, "the configuration should have refused tensor parallelism"

    def cross_entropy(self, ids: Tensor) -> Tensor:
        """-log p(ids), float32 [n]; ids int64 [n]."""
        if not len(ids):  # a rank without rows takes part in collectives, but compiles nothing
            return super().cross_entropy(ids)
        loss: Tensor = _compiled(cross_entropy)(self.outputs, ids)
        return loss

    def log1p_terms(self, ids: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """log p(ids) [n, k] and sum_v log(1 + rho p_v) [n]; ids int64 [n, k], rho [n] constant."""
        if not len(ids):
            return super().log1p_terms(ids, rho)
        log_p, total = _compiled(log1p_terms)(self.outputs, ids, rho)
        return log_p, total

    def divergence_from(self, other: VocabChunk, reverse: bool) -> Tensor:
        """KL(self || other) [n] with `reverse`, else KL(other || self); `other` is a constant."""
        if not len(self.outputs):
            return super().divergence_from(other, reverse)
        kl: Tensor = _compiled(divergence)(self.outputs, other.outputs.detach(), reverse)
        return kl


def cross_entropy(logits: Tensor, ids: Tensor) -> Tensor:
    """-log p(ids) [n] of logits [n, v]."""
    return F.cross_entropy(widen(logits), ids, reduction="none")


def log1p_terms(logits: Tensor, ids: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
    """log p(ids) [n, k] and sum_v log(1 + rho p_v) [n] of logits [n, v], ids [n, k], rho [n]."""
    log_p = widen(logits).log_softmax(dim=-1)
    # A gather's gradient is a scattered sum, which the compiler does not fuse; this one's it does.
    at = [-F.nll_loss(log_p, column, reduction="none") for column in ids.unbind(dim=1)]
    growth = log_p.exp() * rho.to(log_p.dtype)[:, None]
    return torch.stack(at, dim=1), growth.log1p().sum(dim=-1)


def divergence(logits: Tensor, reference: Tensor, reverse: bool) -> Tensor:
    """KL(p || q) [n] of logits of p and of q [n, v] with `reverse`, else KL(q || p)."""
    log_p, log_q = (widen(x).log_softmax(dim=-1) for x in (logits, reference))
    # An excluded column has probability zero in both: there the gap would be -inf minus -inf.
    gap = torch.where(log_q == -torch.inf, 0.0, log_p - log_q)
    return (log_p.exp() * gap if reverse else log_q.exp() * -gap).sum(dim=-1)


@cache
def _compiled(formula: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled when first called: loading the compiler takes seconds that most runs do not need."""
    compiled: Callable[..., Any] = torch.compile(formula, fullgraph=True)
    return compiled
