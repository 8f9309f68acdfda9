"""Transformer and objective as the engine sees them: a batch in, a sum of losses out.

Every host of the engine calls this module the same way, so that neither knows the other's business:
`module(batch)` is what is differentiated, `module(batch, exact=True)` the bound per sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from parallel.context import own_share, sum_over_context
from pretrain.batch import TrainBatch
from pretrain.model.transformer import Transformer
from pretrain.objectives.base import Objective


class ObjectiveModule(nn.Module):
    """The trained module; parameters carry the transformer's canonical names."""

    def __init__(self, model: Transformer, objective: Objective) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    @property
    def tied_parameters(self) -> tuple[str, ...]:
        """Names of parameters that the first and the last stage of a pipeline share."""
        return ("model.embedding.weight",) if self.model.config.tie_embeddings else ()

    def forward(
        self, batch: TrainBatch, exact: bool = False, carried: tuple[Tensor, ...] = ()
    ) -> Tensor | tuple[Tensor, ...]:
        """Sum of weighted token losses (0-d), or with `exact` the bound [b] in float64 nats.

        A pipeline stage goes on from what the one before `carried` out; all but the last return
        what they carry out themselves.
        """
        hidden = self.model(
            batch.ids,
            batch.positions,
            batch.attention,
            batch.noise_level,
            carried=carried,
            mix=batch.mix,
        )
        if not self.model.stage.last:
            return hidden
        rows = hidden.transpose(0, 1).flatten(0, 1)  # [b * s, h]
        if batch.rows is not None:
            rows = rows.index_select(0, batch.rows)
        chunk = self.model.vocabulary(own_share(rows))
        targets, weight = own_share(batch.targets), own_share(batch.weight)
        extra = {name: own_share(values) for name, values in batch.extra.items()}
        if not exact:
            return (self.objective.token_loss(chunk, targets, extra) * weight).sum()
        bound = self.objective.token_bound(chunk, targets, extra).double()
        total = torch.zeros(batch.ids.shape[0], dtype=torch.float64, device=bound.device)
        return sum_over_context(total.index_add(0, own_share(batch.sequence), bound * weight))
