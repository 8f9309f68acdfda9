"""The token embedding: a row of the matrix, or a weighted sum of a few.

Under tensor parallelism each rank sums the rows it holds and the sums are reduced once, so that a
mix of k tokens costs no more communication than one token.
"""

from __future__ import annotations

import torch.nn.functional as F
from megatron.core.tensor_parallel import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from torch import Tensor


class TokenEmbedding(VocabParallelEmbedding):
    """megatron-core's embedding that can also mix."""

    def forward(self, ids: Tensor, mix: Tensor | None = None) -> Tensor:
        """ids int64 [b, s] -> [b, s, h]; with mix [b, s, k] ids are [b, s, k] and weighted by it.

        With sequence parallelism the result is [s / tp, b, h] instead, as megatron-core has it. No
        gradient reaches mix.
        """
        if mix is None:
            embedded: Tensor = super().forward(ids)
            return embedded
        first, last = self.vocab_start_index, self.vocab_end_index
        mine = (ids >= first) & (ids < last)
        # embedding_bag weighs and sums without a [b, s, k, h] tensor in between.
        summed = F.embedding_bag(
            (ids - first).clamp(0, last - first - 1).flatten(0, 1),
            self.weight,
            mode="sum",
            per_sample_weights=(mix * mine).flatten(0, 1).to(self.weight.dtype),
        ).view(*ids.shape[:2], -1)
        if self.reduce_scatter_embeddings:
            summed = summed.transpose(0, 1).contiguous()
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(
                summed, group=self.tp_group
            )
            return scattered
        whole: Tensor = reduce_from_tensor_model_parallel_region(summed, group=self.tp_group)
        return whole
