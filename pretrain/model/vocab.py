"""Vocabulary outputs for losses: log-probabilities and sums that hide tensor parallelism.

Under tensor parallelism every rank holds a slice of the columns. Objectives get the same
log-probabilities and sums over the vocabulary on every rank, with gradients that need no further
reduction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

from parallel.layout.topology import Topology
from pretrain.model.vocab_divergence import Divergence
from pretrain.model.vocab_functions import Log1pSum, LogProbability


class VocabChunk:
    """Head outputs of n positions; excluded columns already hold -inf."""

    def __init__(self, outputs: Tensor, topology: Topology) -> None:
        """Wrap `outputs` [n, v/tp], this rank's columns in the precision of the projection."""
        self.outputs, self.topology = outputs, topology
        self.tp_size, self.group = topology.tensor_parallel_size, topology.tp_group
        self.first = topology.tp_rank * outputs.shape[-1]
        """Number, in the whole vocabulary, of this rank's first column."""

    @property
    def logits(self) -> Tensor:
        """Outputs in float32 (or float64); they replace the outputs in lower precision."""
        self.outputs = widen(self.outputs)
        return self.outputs

    def cross_entropy(self, ids: Tensor) -> Tensor:
        """Compute -log p(ids), float32 [n]; ids int64 [n]."""
        if self.tp_size == 1 and self.logits.is_cuda:
            return F.cross_entropy(self.logits, ids, reduction="none")  # one fused kernel
        return -LogProbability.apply(self.logits, ids[:, None], self.first, self.group)[:, 0]

    def log_sum_exp(self) -> Tensor:
        """Logarithm of the partition sum, float32 [n]."""
        if self.tp_size == 1:
            return self.logits.logsumexp(dim=-1)
        top = self.logits.detach().amax(dim=-1)
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=self.group)
        total = (self.logits - top[:, None]).exp().sum(dim=-1)
        return top + self._sum(total).log()

    def log_prob_at(self, ids: Tensor) -> Tensor:
        """Log-probability of ids int64 [n], float32 [n]."""
        return -self.cross_entropy(ids)

    def sum_over_vocabulary(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Sum f(p_v) over the vocabulary, float32 [n], for an elementwise f of [n, v/tp].

        Excluded columns have p = 0, so f(0) must be 0.
        """
        log_probability = self.logits - self.log_sum_exp()[:, None]
        total = f(log_probability.exp()).sum(dim=-1)
        return self._sum(total)

    def log1p_terms(self, ids: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """Compute log p(ids) [n, k] and sum_v log(1 + rho p_v) [n] in one pass; ids int64 [n, k].

        rho [n] is a constant: no gradient reaches it.
        """
        rho = rho.to(self.logits.dtype)
        log_p, total = Log1pSum.apply(self.logits, ids, rho, self.first, self.group)
        return log_p, total

    def divergence_from(self, other: VocabChunk, reverse: bool) -> Tensor:
        """KL(self || other) [n] with `reverse`, else KL(other || self); `other` is a constant."""
        divergence: Tensor = Divergence.apply(self.logits, other.logits, reverse, self.group)
        return divergence

    def _sum(self, part: Tensor) -> Tensor:
        """Sum of the parts of all tensor-parallel ranks; each rank gets its gradient back."""
        if self.tp_size == 1:
            return part
        whole: Tensor = reduce_from_tensor_model_parallel_region(part, group=self.group)
        return whole


def widen(x: Tensor) -> Tensor:
    """Convert x to float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
