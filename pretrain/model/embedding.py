"""Token embedding: a row of the matrix for each token, or a weighted sum of a few rows.

Under tensor parallelism each rank sums the rows that it holds, and the sums are reduced once. A mix
of k tokens therefore costs no more communication than one token. megatron-core's look-up selects
by a boolean mask the rows of other ranks, which can make the host wait for a GPU; here they are
filled with zeros.
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
    """Embedding of megatron-core, extended to weighted sums."""

    def forward(self, ids: Tensor, mix: Tensor | None = None) -> Tensor:
        """Embed ids int64 [b, s] as [b, s, h]; with mix [b, s, k] ids are [b, s, k] and weighted.

        With sequence parallelism the result is [s / tp, b, h] instead, as in megatron-core. No
        gradient reaches mix.
        """
        partial = self._rows(ids) if mix is None else self._mixed(ids, mix)
        if self.reduce_scatter_embeddings:
            partial = partial.transpose(0, 1).contiguous()  # [s, b, h]
            scattered: Tensor = reduce_scatter_to_sequence_parallel_region(
                partial, group=self.tp_group
            )
            return scattered
        whole: Tensor = reduce_from_tensor_model_parallel_region(partial, group=self.tp_group)
        return whole

    def _rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix for ids [b, s]; zeros where another rank holds the row."""
        if self.tp_group.size() == 1:
            return F.embedding(ids, self.weight)
        local, mine = self._local(ids)
        return F.embedding(local, self.weight).masked_fill_(~mine[..., None], 0.0)

    def _mixed(self, ids: Tensor, mix: Tensor) -> Tensor:
        """Weighted sums [b, s, h] of the rows that this rank holds."""
        local, mine = self._local(ids)
        # embedding_bag weights and sums without a temporary tensor [b, s, k, h].
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
