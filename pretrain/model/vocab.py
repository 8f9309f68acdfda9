"""What a loss sees of the head: probabilities over the vocabulary, its shards kept inside.

Under tensor parallelism every rank holds a slice of the columns. Objectives ask for log
probabilities or sums over the vocabulary and get the same numbers on every rank, with gradients
that need no further reduction.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.utils import VocabUtility
from torch import Tensor

from pretrain.model.vocab_divergence import Divergence
from pretrain.model.vocab_functions import Log1pSum, LogProbability


class VocabChunk:
    """Head outputs of n positions; excluded columns already hold -inf."""

    def __init__(self, outputs: Tensor) -> None:
        """`outputs` [n, v/tp]: this rank's columns in the precision of the projection."""
        self.outputs = outputs
        self.tp_size = parallel_state.get_tensor_model_parallel_world_size()
        self.first, self.last = VocabUtility.vocab_range_from_per_partition_vocab_size(
            outputs.shape[-1], parallel_state.get_tensor_model_parallel_rank(), self.tp_size
        )

    @property
    def logits(self) -> Tensor:
        """The outputs in float32 (or float64), which take the place of those they come from."""
        self.outputs = widen(self.outputs)
        return self.outputs

    def cross_entropy(self, ids: Tensor) -> Tensor:
        """-log p(ids), float32 [n]; ids int64 [n]."""
        if self.tp_size == 1 and self.logits.is_cuda:
            return F.cross_entropy(self.logits, ids, reduction="none")  # one fused kernel
        return -LogProbability.apply(self.logits, ids[:, None], self.first)[:, 0]

    def log_sum_exp(self) -> Tensor:
        """log of the partition sum, float32 [n]."""
        if self.tp_size == 1:
            return self.logits.logsumexp(dim=-1)
        top = self.logits.detach().amax(dim=-1)
        torch.distributed.all_reduce(
            top,
            op=torch.distributed.ReduceOp.MAX,
            group=parallel_state.get_tensor_model_parallel_group(),
        )
        total = (self.logits - top[:, None]).exp().sum(dim=-1)
        return top + reduce_from_tensor_model_parallel_region(total).log()

    def log_prob_at(self, ids: Tensor) -> Tensor:
        """log p(ids), float32 [n]; ids int64 [n]."""
        return -self.cross_entropy(ids)

    def sum_over_vocabulary(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        """sum_v f(p_v), float32 [n], for an elementwise f of probabilities [n, v/tp]; excluded
        columns have p = 0, so f(0) must be 0."""
        log_probability = self.logits - self.log_sum_exp()[:, None]
        total = f(log_probability.exp()).sum(dim=-1)
        return reduce_from_tensor_model_parallel_region(total) if self.tp_size > 1 else total

    def log1p_terms(self, ids: Tensor, rho: Tensor) -> tuple[Tensor, Tensor]:
        """log p(ids) [n, k] and sum_v log(1 + rho p_v) [n] in one pass; ids int64 [n, k].

        rho [n] is a constant: no gradient reaches it.
        """
        log_p, total = Log1pSum.apply(self.logits, ids, rho.to(self.logits.dtype), self.first)
        return log_p, total

    def divergence_from(self, other: VocabChunk, reverse: bool) -> Tensor:
        """KL(self || other) [n] with `reverse`, else KL(other || self); `other` is a constant."""
        divergence: Tensor = Divergence.apply(self.logits, other.logits, reverse)
        return divergence


def widen(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
