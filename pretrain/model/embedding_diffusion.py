"""Auxiliary network of Gaussian diffusion: embeds noisy inputs, computes the parts of the bound.

    z = alpha E[x] + sigma eps                    rows of E have unit norm
    in   enter(z / sqrt(alpha^2 / d + sigma^2)) + remember(m sqrt(d)) + tell(sinusoids of gamma)
    out  p = softmax(logits + (alpha / sigma^2) z . E_v),   m = sum_v p_v E_v

The second summand of the softmax is log N(z; alpha E_v, sigma^2) up to a constant (the output
prior). The transformer therefore needs to predict only what the other tokens say of a token. m is
the estimate of E[x]; with self-conditioning it comes from a first pass without gradient. Everything
outside the transformer is float64, except sums over the vocabulary, which have the precision of the
logits.

Tensor parallelism shards E by rows. The other weights are replicated, and every rank computes the
same with them.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from parallel.layers import mark_tensor_parallel, parallel_config, scatter_sequence
from pretrain.batch import AttentionRule, TrainBatch
from pretrain.model.chunked import each
from pretrain.model.embedding import TokenEmbedding
from pretrain.model.initialize import keyed_normal
from pretrain.model.layers import no_init
from pretrain.model.size import LEVEL_FREQUENCIES
from pretrain.model.transformer import Transformer
from pretrain.model.vocab import VocabChunk
from pretrain.model.vocab_expectation import VocabularyMean
from pretrain.noise.learned import LearnedSchedule, Level

LR_SCALE = 7.0
"""Learning rate of embeddings and schedule, as a factor of that of matrices (1e-2 over 1.4e-3 in
Plaid)."""


class UnitEmbedding(TokenEmbedding):
    """Embeddings whose rows are normalised at every use."""

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        """Unit rows of ids [b, s], [b, s, d], and this rank's slice of all rows [v/tp, d]; float64.

        Both are computed here, because ZeRO 3 gathers the weight only while this method runs.
        """
        rows = F.normalize(super().forward(ids).double(), dim=-1)
        return rows, F.normalize(self.weight.double(), dim=-1)


class EmbeddingDiffusion(nn.Module):
    """Weights that the gaussian objective adds to the transformer's, and its two passes."""

    def __init__(
        self,
        model: Transformer,
        size: int,
        end_points: tuple[float, float],
        seed: int,
    ) -> None:
        super().__init__()
        hidden = model.config.hidden_size
        self.size = size
        self.embedding = UnitEmbedding(
            model.space.padded_vocab_size,
            size,
            init_method=no_init,
            config=parallel_config(model.topology),
        )
        self.schedule = LearnedSchedule(end_points)
        self.enter = nn.Linear(size, hidden, bias=False)
        self.remember = nn.Linear(size, hidden, bias=False)
        self.tell = nn.Linear(2 * LEVEL_FREQUENCIES, hidden)
        self._initialize(seed, model.topology.tp_rank)

    @property
    def lr_scales(self) -> dict[str, float]:
        """Factors of the learning rate by parameter; these parameters have no weight decay."""
        return {
            name: LR_SCALE
            for name, _ in self.named_parameters()
            if name.startswith(("embedding.", "schedule."))
        }

    def forward(self, model: Transformer, batch: TrainBatch, exact: bool = False) -> Tensor:
        """Sum of weighted terms (0-d), or with `exact` the parts of the bound, float64 [3 b].

        Parts are reconstruction, diffusion and prior of b sequences, one after the other. They come
        from 2 b rows: the sequences at t = 0, then the same sequences each at its own t.
        """
        given, (b, s) = batch.auxiliary, batch.ids.shape
        # In a sequence that conditions on a first pass, only the transformer gets a gradient.
        learns = ~given["conditioned"]
        rows, table = self.embedding(batch.ids)  # [b, s, d], [v / tp, d]
        factor = torch.zeros_like(given["time"])
        schedule = self.schedule(given["time"], factor)
        gamma, speed, last = (_learned(value, learns) for value in schedule)  # [b] each
        level = Level(gamma[:, None, None])
        e = _learned(rows, learns[:, None, None])
        z = level.alpha * e + level.sigma * given["normal"]  # [b, s, d]
        memory = self._first_pass(model, batch, z, gamma, table)
        answer, query = self.ask(
            model,
            batch.ids,
            batch.positions,
            batch.attention,
            z,
            gamma,
            memory,
            batch.dropout_seed,
        )
        log_p, mean = mean_embedding(model, answer, query, table, batch.targets, learns)
        error = (e - mean.double().view_as(e)).square().sum(dim=-1)
        squared_norm = e.square().sum(dim=-1)
        parts = torch.stack(
            (
                -log_p.double().view(b, s),
                0.5 * (speed * torch.exp(-gamma))[:, None] * error,
                Level(last[:, None]).prior_kl(squared_norm, self.size),
            )
        )
        parts = parts * batch.weight.double().view(b, s)
        sums = (parts * given["terms"].t()[..., None]).sum(dim=-1)  # [3, b]
        if exact:
            return sums.view(3, 2, -1).sum(dim=1).flatten()
        tokens = batch.weight.double().view(b, s).sum(dim=-1).clamp(min=1.0)
        # The schedule's gradient becomes that of the squared loss, i.e. of the bound's variance.
        factor.copy_(2.0 * parts[1].detach().sum(dim=-1) / tokens)
        return sums.sum().float()

    def ask(
        self,
        model: Transformer,
        ids: Tensor,
        positions: Tensor,
        rule: AttentionRule,
        z: Tensor,
        gamma: Tensor,
        memory: Tensor,
        dropout_seed: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Hidden rows [b * s, h] of the transformer for z [b, s, d] at gamma [b], and queries
        [b * s, d] of the output prior; `memory` [b, s, d] is an earlier estimate, 0 for none."""
        level = Level(gamma[:, None, None])
        scale = (level.alpha.square() / self.size + level.sigma.square()).rsqrt()
        dtype = self.enter.weight.dtype
        x = self.enter((z * scale).to(dtype)) + self.remember((memory * self.size**0.5).to(dtype))
        x = (x + self.tell(_sinusoids(gamma).to(dtype))[:, None]).transpose(0, 1).contiguous()
        if model.topology.sequence_parallel:
            x = scatter_sequence(x, model.topology)
        carried = (x,)
        if model.config.time_conditioning:
            noise_level = -level.alpha.log().flatten().float()
            carried = (model.noise_embedding(noise_level), x)  # type: ignore[assignment]
        hidden = model(ids, positions, rule, carried=carried, dropout_seed=dropout_seed)
        return hidden.transpose(0, 1).flatten(0, 1), (level.sharpness * z).flatten(0, 1)

    def _first_pass(
        self, model: Transformer, batch: TrainBatch, z: Tensor, gamma: Tensor, table: Tensor
    ) -> Tensor:
        """Estimates [b, s, d] of a pass without gradient, 0 for sequences without
        self-conditioning."""
        memory = torch.zeros_like(z, requires_grad=False)
        index = batch.auxiliary.get("first_pass")
        if index is None:
            return memory
        rule, positions = batch.auxiliary["first_rule"], batch.positions
        if len(positions) > 1:
            positions = positions[index]
        with torch.no_grad():
            ids, part = batch.ids[index], z[index]
            answer, query = self.ask(model, ids, positions, rule, part, gamma[index], memory[index])
            none = torch.zeros(len(index), dtype=torch.bool, device=z.device)
            _, mean = mean_embedding(model, answer, query, table, ids.flatten(), none)
            conditioned = batch.auxiliary["conditioned"][index, None, None]
            memory[index] = torch.where(conditioned, mean.double().view_as(part), 0.0)
        return memory

    @torch.no_grad()
    def _initialize(self, seed: int, tp_rank: int) -> None:
        """Draw weights keyed by (seed, name, element); `remember` and `tell` start at zero."""

        def draw(name: str, rows: range, width: int) -> Tensor:
            return keyed_normal(seed, f"own.{name}", rows, slice(None), width)

        weight = self.embedding.weight
        first = tp_rank * len(weight)
        mine = range(first, first + len(weight))
        std = self.size**-0.5
        weight.copy_(std * draw("embedding.weight", mine, self.size))
        mark_tensor_parallel(weight, 0)
        for name in ("steepness", "offset", "height"):
            parameter = getattr(self.schedule, name)
            parameter.copy_(draw(f"schedule.{name}", range(1), len(parameter))[0])
        rows = range(self.enter.weight.shape[0])
        self.enter.weight.copy_(std * draw("enter.weight", rows, self.size))
        for parameter in (self.remember.weight, self.tell.weight, self.tell.bias):
            parameter.zero_()


def mean_embedding(
    model: Transformer,
    rows: Tensor,
    query: Tensor,
    table: Tensor,
    targets: Tensor,
    learns: Tensor,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets [n] and mean embeddings [n, d] under the output prior.

    Both are of hidden rows [n, h]. `learns` [b] is True for sequences in which the table gets a
    gradient. Without gradients the rows are computed in chunks.
    """
    learning = learns.repeat_interleave(len(targets) // len(learns))

    def terms(chunk: VocabChunk, part: slice) -> Tensor:
        dtype = chunk.logits.dtype
        log_p, mean = VocabularyMean.apply(
            chunk.logits,
            query[part].to(dtype),
            table.to(dtype),
            targets[part],
            learning[part],
            chunk.first,
            chunk.group,
        )
        return torch.cat((log_p[:, None], mean), dim=1)

    scored = model.score(rows, partial(each, terms=terms, chunk=None))
    return scored[:, 0], scored[:, 1:]


def _learned(value: Tensor, learns: Tensor) -> Tensor:
    """Return `value` unchanged, with a gradient only where `learns` is True."""
    return torch.where(learns, value, value.detach())


def _sinusoids(gamma: Tensor) -> Tensor:
    """Sinusoids of gamma [b] at frequencies from e^-5 to e^5, [b, 2 LEVEL_FREQUENCIES]."""
    exponent = torch.linspace(-5.0, 5.0, LEVEL_FREQUENCIES, dtype=gamma.dtype, device=gamma.device)
    phase = gamma[:, None] * exponent.exp()
    return torch.cat((phase.sin(), phase.cos()), dim=-1)
