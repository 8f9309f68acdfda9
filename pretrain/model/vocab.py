"""Head as a loss sees it: probabilities over the vocabulary, its shards kept inside.

Under tensor parallelism every rank holds a slice of the columns. Objectives ask for log
probabilities or sums over the vocabulary and get the same numbers on every rank, with gradients
that need no further reduction.
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
        """`outputs` [n, v/tp]: this rank's columns in the precision of the projection."""
        self.outputs, self.topology = outputs, topology
        self.tp_size, self.group = topology.tensor_parallel_size, topology.tp_group
        self.first = topology.tp_rank * outputs.shape[-1]
        """Column of the whole vocabulary that this rank's first one is."""

    @property
    def logits(self) -> Tensor:
        """The outputs in float32 (or float64), which take the place of those they come from."""
        self.outputs = widen(self.outputs)
        return self.outputs

    def cross_entropy(self, ids: Tensor) -> Tensor:
        """-log p(ids), float32 [n]; ids int64 [n]."""
        if self.tp_size == 1 and self.logits.is_cuda:
            return F.cross_entropy(self.logits, ids, reduction="none")  # one fused kernel
        return -LogProbability.apply(self.logits, ids[:, None], self.first, self.group)[:, 0]

    def log_sum_exp(self) -> Tensor:
        """log of the partition sum, float32 [n]."""
        if self.tp_size == 1:
            return self.logits.logsumexp(dim=-1)
        top = self.logits.detach().amax(dim=-1)
        torch.distributed.all_reduce(top, op=torch.distributed.ReduceOp.MAX, group=self.group)
        total = (self.logits - top[:, None]).exp().sum(dim=-1)
        return top + self._sum(total).log()

    def log_prob_at(self, ids: Tensor) -> Tensor:
        """log p(ids), float32 [n]; ids int64 [n]."""
        return -self.cross_entropy(ids)

    def sum_over_vocabulary(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """sum_v f(p_v), float32 [n], for an elementwise f of probabilities [n, v/tp]; excluded
        columns have p = 0, so f(0) must be 0."""
        log_probability = self.logits - self.log_sum_exp()[:, None]
        total = f(log_probability.exp()).sum(dim=-1)
        return self._sum(total)

    def log1p_terms(self, ids: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """log p(ids) [n, k] and sum_v log(1 + rho p_v) [n] in one pass; ids int64 [n, k].

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
    """`x` in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
