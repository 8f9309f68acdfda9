"""The token embedding: a row of the matrix, or a weighted sum of a few.

Under tensor parallelism each rank sums the rows it holds and the sums are reduced once, so that a
mix of k tokens costs no more communication than one token. megatron-core's own look-up indexes by a
mask of what other ranks hold, which can make the host wait for a GPU; here such rows are filled.
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
        own = self._rows(ids) if mix is None else self._mixed(ids, mix)
        if self.reduce_scatter_embeddings:
            own = own.transpose(0, 1).contiguous()
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(own, group=self.tp_group)
            return scattered
        whole: Tensor = reduce_from_tensor_model_parallel_region(own, group=self.tp_group)
        return whole

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of this rank's ids, zero where another rank holds them."""
        if self.tp_group.size() == 1:
            return F.embedding(ids, self.weight)
        local, mine = self._local(ids)
        return F.embedding(local, self.weight).masked_fill_(~mine[..., None], 0.0)

    def _mixed(self, ids: Tensor, mix: Tensor) -> Tensor:
        """Weighted sums of the rows that this rank holds."""
        local, mine = self._local(ids)
        # embedding_bag weighs and sums without a [b, s, k, h] tensor in between.
        return F.embedding_bag(
            local.flatten(0, 1),
            self.weight,
            mode="sum",
            per_sample_weights=(mix * mine).flatten(0, 1).to(self.weight.dtype),
        ).view(*ids.shape[:2], -1)

    def _local(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Row of this rank's shard for each id, and True where the id lies in it."""
        first, last = self.vocab_start_index, self.vocab_end_index
        return (ids - first).clamp(0, last - first - 1), (ids >= first) & (ids < last)
