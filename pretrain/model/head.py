"""Head of the transformer: from hidden rows to outputs over the vocabulary."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn

from parallel.layers import parallel_config
from parallel.layout.topology import Topology
from pretrain.config.run import ModelConfig
from pretrain.model.chunked import Outputs
from pretrain.model.conditioning import Modulation, modulate
from pretrain.model.layers import RMSNorm, no_init
from pretrain.model.parametrization import logit_multiplier
from pretrain.model.vocab import VocabChunk
from pretrain.vocabulary import TokenSpace

Score = Callable[[Outputs, Tensor, Tensor], Tensor]
"""(vocabulary outputs of rows and weight, rows [n, h], weight [v/tp, h]) -> scores."""


class Head(nn.Module):
    """Final norm and projection to the vocabulary; excluded columns have probability zero."""

    def __init__(self, config: ModelConfig, topology: Topology, space: TokenSpace) -> None:
        super().__init__()
        self.topology = topology
        size, partial = config.hidden_size, topology.sequence_parallel
        self.multiplier = logit_multiplier(config)
        self.norm = RMSNorm(size, config.norm_eps, topology, partial)
        self.modulation = Modulation(2, size, topology) if config.time_conditioning else None
        # Rows come from the whole sequence.
        parallel = replace(parallel_config(topology), sequence_parallel=False)
        self.projection = ColumnParallelLinear(
            size,
            space.padded_vocab_size,
            config=parallel,
            init_method=no_init,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=config.tie_embeddings,
        )
        columns = space.padded_vocab_size // topology.tensor_parallel_size
        first = columns * topology.tp_rank
        mine = [c - first for c in space.excluded_columns if first <= c < first + columns]
        self.register_buffer("excluded", torch.tensor(mine, dtype=torch.int64), persistent=False)

    def hidden(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Apply the final norm and the multiplier of the logits to x [s, b, h]; condition [b, c]
        or None."""
        x = self.norm(x)
        if self.modulation is not None:
            assert condition is not None, "a time-conditioned model needs a noise level"
            x = modulate(x, *self.modulation(condition))
        # Logits are linear in x, which is smaller than they are.
        return x if self.multiplier == 1 else x * self.multiplier

    def forward(
        self, rows: Tensor, tied: nn.Module | None, score: Score | None = None
    ) -> VocabChunk | Tensor:
        """Vocabulary outputs of rows [n, h], or the result of `score` for them.

        `tied` is the embedding where the head shares its weight. Every use of the weight is inside
        this method, because ZeRO 3 gathers the weight here, once.
        """
        weight: Tensor = (self.projection if tied is None else tied).weight  # type: ignore[assignment]
        if score is None:
            return self._outputs(rows, weight, self.projection)
        # As a call of the module, each chunk would make ZeRO 3 release the weight after it.
        return score(
            functools.partial(self._outputs, project=self.projection.forward), rows, weight
        )

    def _outputs(self, rows: Tensor, weight: Tensor, project: Callable[..., Any]) -> VocabChunk:
        """Outputs of rows [n, h], this rank's columns; excluded columns hold -inf."""
        # megatron-core's layer expects three dimensions: [n, 1, h] -> [n, 1, v / tp].
        logits = project(rows[:, None], weight=weight)[0]
        # The gradient of a column of probability zero is zero either way. Filling comes before any
        # view is taken; after it the gradient of the view would be a zero-filled copy of the whole.
        with torch.no_grad():
            logits.index_fill_(2, self.excluded, -torch.inf)
        return VocabChunk(logits.squeeze(1), self.topology)
