"""The one transformer that every objective trains: pre-norm, rotary, SwiGLU, tied head by default.

It is a list of parts (`embedding`, `layers`, `head`) rather than one graph, so that stages of a
pipeline can be cut between any two of them. No part knows which objective runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.context import context_rank, gather_positions, own_positions
from parallel.layers import gather_sequence
from parallel.layout.stages import Stage, whole_model
from pretrain.batch import AttentionRule
from pretrain.config.run import ModelConfig
from pretrain.model.attention import AttentionPlan, Call, plan_attention
from pretrain.model.chunked import Outputs
from pretrain.model.conditioning import Modulation, NoiseEmbedding, modulate
from pretrain.model.dropout import DropoutKey, dropout
from pretrain.model.embedding import TokenEmbedding
from pretrain.model.layers import MLP, Attention, RMSNorm, _no_init, column_linear, rotary_phases
from pretrain.model.recompute import Keep, Mode, Recompute
from pretrain.model.vocab import VocabChunk
from pretrain.vocabulary import TokenSpace

Score = Callable[[Outputs, Tensor, Tensor], Tensor]
"""(vocabulary outputs of rows and weight, rows [n, h], weight [v/tp, h]) -> scores."""


class TransformerLayer(nn.Module):
    """Attention and MLP, each behind a norm and (if conditioned) a modulation."""

    def __init__(self, config: ModelConfig, parallel: ModelParallelConfig, keep: Keep) -> None:
        super().__init__()
        self.keep = keep
        partial = parallel.sequence_parallel
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, partial)
        self.attention = Attention(config, parallel, keep)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps, partial)
        self.mlp = MLP(config, parallel, keep)
        self.dropout = config.dropout
        self.modulation = (
            Modulation(6, config.hidden_size, partial) if config.time_conditioning else None
        )

    def forward(
        self,
        x: Tensor,
        plan: AttentionPlan,
        phases: tuple[Tensor, Tensor],
        condition: Tensor | None,
        key: DropoutKey | None = None,
    ) -> Tensor:
        """[s, b, h] -> [s, b, h]; condition [b, c] or None; without a key nothing is dropped."""
        drop = functools.partial(dropout, p=self.dropout, key=key)
        if self.modulation is None:
            y = self._normed(x, self.attention_norm, (), self.attention, plan, phases, key)
            x = x + drop(y, place="attention")
            return x + drop(self._normed(x, self.mlp_norm, (), self.mlp), place="mlp")
        assert condition is not None, "a time-conditioned model needs a noise level"
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)
        y = self._normed(
            x, self.attention_norm, (shift1, scale1), self.attention, plan, phases, key
        )
        x = x + gate1 * drop(y, place="attention")
        y = self._normed(x, self.mlp_norm, (shift2, scale2), self.mlp)
        return x + gate2 * drop(y, place="mlp")

    def _normed(
        self, x: Tensor, norm: RMSNorm, modulation: tuple[Tensor, ...], part: nn.Module, *rest: Any
    ) -> Tensor:
        """`part` of normed and modulated x, of which only x need be kept."""

        def prepare(x: Tensor, *modulation: Tensor) -> Tensor:
            h = norm(x)
            if modulation:
                with self.keep.instead_of(h, norm, x):
                    h = modulate(h, *modulation)
            return h

        h = prepare(x, *modulation)
        with self.keep.instead_of(h, prepare, x, *modulation):
            out: Tensor = part(h, *rest)
        return out


class Head(nn.Module):
    """Final norm and projection to the vocabulary; excluded columns get probability zero."""

    def __init__(
        self, config: ModelConfig, parallel: ModelParallelConfig, space: TokenSpace
    ) -> None:
        super().__init__()
        size, partial = config.hidden_size, parallel.sequence_parallel
        self.norm = RMSNorm(size, config.norm_eps, partial)
        self.modulation = Modulation(2, size, partial) if config.time_conditioning else None
        parallel = replace(parallel, sequence_parallel=False)  # rows come from the whole sequence
        self.projection = (
            ColumnParallelLinear(
                size,
                space.padded_vocab_size,
                config=parallel,
                init_method=_no_init,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=True,
            )
            if config.tie_embeddings
            else column_linear(parallel, size, space.padded_vocab_size)
        )
        columns = space.padded_vocab_size // parallel.tensor_model_parallel_size
        first = columns * _tensor_parallel_rank()
        mine = [c - first for c in space.excluded_columns if first <= c < first + columns]
        self.register_buffer("excluded", torch.tensor(mine, dtype=torch.int64), persistent=False)

    def hidden(self, x: Tensor, condition: Tensor | None) -> Tensor:
        """Final norm: [s, b, h] -> [s, b, h]."""
        x = self.norm(x)
        if self.modulation is not None:
            assert condition is not None, "a time-conditioned model needs a noise level"
            x = modulate(x, *self.modulation(condition))
        return x

    def forward(
        self, rows: Tensor, tied: nn.Module | None, score: Score | None = None
    ) -> VocabChunk | Tensor:
        """Vocabulary outputs of rows [n, h], or what `score` makes of them.

        `tied` is the embedding, if the weight is its. Everything that reads the weight happens
        in here, because ZeRO 3 gathers it here, once.
        """
        weight: Tensor = (self.projection if tied is None else tied).weight  # type: ignore[assignment]
        if score is None:
            return self._outputs(rows, weight, self.projection)
        # Called as a module, the projection would make ZeRO 3 drop the weight after every chunk.
        return score(
            functools.partial(self._outputs, project=self.projection.forward), rows, weight
        )

    def _outputs(self, rows: Tensor, weight: Tensor, project: Callable[..., Any]) -> VocabChunk:
        """Outputs of rows [n, h]; excluded columns hold -inf."""
        # Three dimensions, because megatron-core's layer counts on [s, b, h].
        logits = project(rows[:, None], weight=weight)[0]
        # A column of probability zero has gradient zero either way. Filled before any view is
        # taken: after it, the gradient of the view would become a zero-filled copy of the whole.
        with torch.no_grad():
            logits.index_fill_(2, self.excluded, -torch.inf)
        return VocabChunk(logits.squeeze(1))


class Transformer(nn.Module):
    """Token ids to hidden states, hidden states to vocabulary chunks.

    In a pipeline, `stage` says which part of it exists here; names of parameters stay those of the
    whole, and a tied embedding exists on the last stage too.
    """

    def __init__(
        self,
        config: ModelConfig,
        space: TokenSpace,
        parallel: ModelParallelConfig,
        stage: Stage | None = None,
        recompute: Recompute | None = None,
    ) -> None:
        super().__init__()
        self.config, self.space, self.parallel = config, space, parallel
        self.recompute = Recompute() if recompute is None else recompute
        self.stage = whole_model(config.num_layers) if stage is None else stage
        if self.stage.first or (self.stage.last and config.tie_embeddings):
            self.embedding = TokenEmbedding(
                space.padded_vocab_size,
                config.hidden_size,
                init_method=_no_init,
                reduce_scatter_embeddings=parallel.sequence_parallel,
                config=parallel,
            )
        if self.stage.first and config.time_conditioning:
            self.noise_embedding = NoiseEmbedding()
        self.layers = nn.ModuleList(
            TransformerLayer(config, parallel, Keep(self._mode(i) == "selective"))
            if i in self.stage.layers
            else nn.Identity()
            for i in range(config.num_layers)
        )
        if self.stage.last:
            self.head = Head(config, parallel, space)
        self.sequence_parallel = parallel.sequence_parallel

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        rule: AttentionRule,
        noise_level: Tensor | None = None,
        carried: tuple[Tensor, ...] = (),
        mix: Tensor | None = None,
        dropout_seed: int | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """ids [b, s], positions [b or 1, s] -> normalised hidden states [s, b, h].

        With mix [b, s, k] ids are [b, s, k] and each input is a weighted sum of embeddings.
        A training pass with dropout needs the `dropout_seed` of its micro-batch; in evaluation
        nothing is dropped. `carried` is what enters the first layer here; without it the first
        stage embeds ids.
        Between stages of a pipeline travels what is not last: `carried`, in a conditioned model the
        condition [b, c], and the hidden states [s, b, h]. These come last, because DeepSpeed runs a
        backward pass for each and keeps the graph until the last one; a compiled layer's is never
        kept.
        """
        if self.stage.first and not carried:
            carried = self._embed(ids, mix, noise_level)
        *rest, x = carried
        key = self._dropout_key(dropout_seed)
        if self.stage.first:
            x = dropout(x, self.config.dropout, key, "embedding")
        condition = rest[0] if rest else None
        phases = rotary_phases(
            own_positions(positions, 1), self.config.head_size, self.config.rope_base
        )
        call = Call.like(x, self.config.head_size, self.config.attention_dropout > 0)
        plan = plan_attention(rule, self.config.attention, call, *ids.shape[:2])
        for i in self.stage.layers:
            layer: Callable[..., Tensor] = self.layers[i]
            if self._mode(i) == "full" and torch.is_grad_enabled():
                layer = functools.partial(
                    checkpoint, layer, use_reentrant=False, preserve_rng_state=False
                )
            x = layer(x, plan, phases, condition, None if key is None else replace(key, layer=i))
        if not self.stage.last:
            return (*rest, x)
        hidden: Tensor = self.head.hidden(x, condition)
        return gather_sequence(hidden) if self.sequence_parallel else gather_positions(hidden)

    def compile_layers(self) -> None:
        """Let torch compile each layer when it is first called; modules and names stay."""
        for i in self.stage.layers:
            self.layers[i].compile(dynamic=False)

    def _embed(
        self, ids: Tensor, mix: Tensor | None, noise_level: Tensor | None
    ) -> tuple[Tensor, ...]:
        """In a conditioned model the condition, and hidden states before the first layer."""
        x = self.embedding(own_positions(ids, 1), None if mix is None else own_positions(mix, 1))
        if not self.sequence_parallel:  # megatron-core already returns [s/tp, b, h] with it
            x = x.transpose(0, 1).contiguous()
        if not self.config.time_conditioning:
            return (x,)
        if noise_level is None:  # families without a level still have the same parameters
            noise_level = torch.zeros(ids.shape[0], device=ids.device)
        return self.noise_embedding(noise_level), x

    def _dropout_key(self, seed: int | None) -> DropoutKey | None:
        """Key of the masks of this pass on this rank; None where nothing is dropped."""
        drops = self.config.dropout > 0 or self.config.attention_dropout > 0
        if seed is None or not drops or not self.training:
            training = self.training and torch.is_grad_enabled()
            assert not (drops and training), "training with dropout needs a dropout_seed"
            return None
        tensor, context = _tensor_parallel_rank(), context_rank()
        # Without sequence parallelism all tensor-parallel ranks hold the same residual stream.
        stretch = tensor if self.sequence_parallel else 0
        return DropoutKey(seed, f"{stretch}/{context}", f"{tensor}/{context}")

    def _mode(self, i: int) -> Mode:
        """How much of layer i is kept."""
        return self.recompute.of(i - self.stage.layers.start)

    def vocabulary(self, rows: Tensor) -> VocabChunk:
        """Vocabulary outputs for hidden rows [n, h]."""
        chunk: VocabChunk = self.head(rows, self._tied)
        return chunk

    def score(self, rows: Tensor, score: Score) -> Tensor:
        """What `score` makes of the vocabulary outputs of hidden rows [n, h]."""
        result: Tensor = self.head(rows, self._tied, score)
        return result

    @property
    def _tied(self) -> TokenEmbedding | None:
        return self.embedding if self.config.tie_embeddings else None


def _tensor_parallel_rank() -> int:
    from megatron.core import parallel_state

    return int(parallel_state.get_tensor_model_parallel_rank())
