"""Module of transformer and objective that the engine trains: a batch in, a sum of losses out.

Every engine calls it the same way: `module(batch)` is the loss that is differentiated, and
`module(batch, exact=True)` the bound of each sequence. The auxiliary network of an objective
(`own`) is called in place of the transformer, and calls the transformer itself.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from parallel.context import local_targets, sum_over_context
from pretrain.batch import TrainBatch
from pretrain.model.chunked import each, total
from pretrain.model.parametrization import Multipliers, multipliers
from pretrain.model.teacher import Teacher
from pretrain.model.transformer import Transformer
from pretrain.model.vocab import VocabChunk
from pretrain.model.vocab_compiled import CompiledChunk
from pretrain.objectives.base import Objective


class ObjectiveModule(nn.Module):
    """Trained module; its parameters have the transformer's canonical names after `model.`."""

    def __init__(
        self,
        model: Transformer,
        objective: Objective,
        seed: int = 0,
        loss_chunk: int | None = None,
        compile_loss: bool = False,
    ) -> None:
        """Join both; `seed` is that of the auxiliary network's weights.

        `loss_chunk` rows are scored at once: 0 means all, None as many as memory suggests.
        `compile_loss` affects training only.
        """
        super().__init__()
        self.model = model
        self.objective = objective
        self.own = objective.auxiliary_network(model, seed)
        self.loss_chunk = loss_chunk
        self.compile_loss = compile_loss
        self.teacher: Teacher | None = None
        """Frozen model that a distilling objective learns from while training."""

    @property
    def tied_parameters(self) -> tuple[str, ...]:
        """Names of parameters that the first and the last stage of a pipeline share."""
        return ("model.embedding.weight",) if self.model.config.tie_embeddings else ()

    @property
    def lr_scales(self) -> dict[str, float]:
        """Factors of the learning rate for some parameters, which have no weight decay."""
        if self.own is None:
            return {}
        return {f"own.{name}": scale for name, scale in self.own.lr_scales.items()}

    def multipliers(self, name: str) -> Multipliers:
        """Factors of the optimizer's settings for a parameter, which follow from the size of the
        model."""
        return multipliers(name, self.model.config)

    def forward(
        self, batch: TrainBatch, exact: bool = False, carried: tuple[Tensor, ...] = ()
    ) -> Tensor | tuple[Tensor, ...]:
        """Sum of weighted token losses (0-d), or with `exact` the bound [b] in float64 nats.

        An objective with `bound_parts` p gives [p b]: one part of all sequences after the other.
        A pipeline stage continues from `carried`, the result of the stage before; every stage but
        the last returns such tensors.
        """
        if self.own is not None:
            scored: Tensor = self.own(self.model, batch, exact)
            return scored
        hidden = self.model(
            batch.ids,
            batch.positions,
            batch.attention,
            batch.noise_level,
            carried=carried,
            mix=batch.mix,
            dropout_seed=batch.dropout_seed,
        )
        if not self.model.stage.last:
            return hidden
        # Rows that are scored [n, h], then this context-parallel rank's share of them.
        rows = hidden.transpose(0, 1).flatten(0, 1)  # [b * s, h]
        if batch.rows is not None:
            rows = rows.index_select(0, batch.rows)
        local = partial(local_targets, topology=self.model.topology)
        targets, weight = local(batch.targets), local(batch.weight)
        extra = {name: local(values) for name, values in batch.extra.items()}
        term = self.objective.token_bound if exact else self.objective.token_loss
        taught = None if exact or self.teacher is None else self.teacher.outputs(batch)

        def terms(chunk: VocabChunk, part: slice) -> Tensor:
            if self.compile_loss and not exact:
                chunk = CompiledChunk(chunk)
            if taught is not None:
                return self.objective.teacher_loss(chunk, taught(part)) * weight[part]
            loss = term(chunk, targets[part], {name: v[part] for name, v in extra.items()})
            return (loss.double() if exact else loss) * weight[part]

        score = partial(each if exact else total, terms=terms, chunk=self.loss_chunk)
        scored = self.model.score(local(rows), score)
        if not exact:
            return scored
        bound = torch.zeros(batch.ids.shape[0], dtype=torch.float64, device=scored.device)
        bound = bound.index_add(0, local(batch.sequence), scored)
        return sum_over_context(bound, self.model.topology)
