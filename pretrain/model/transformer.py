"""Transformer of every objective: pre-norm, rotary positions, SwiGLU and a tied head by default.

It is a list of parts (`embedding`, `layers`, `head`), so that pipeline stages can begin at any
layer. No part depends on the objective.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from parallel.context import gather_positions, local_positions
from parallel.layers import gather_sequence, parallel_config
from parallel.layout.stages import Stage, whole_model
from parallel.layout.topology import Topology
from pretrain.batch import AttentionRule
from pretrain.config.run import ModelConfig
from pretrain.model.attention import AttentionPlan, Call, plan_attention
from pretrain.model.cache import Cache
from pretrain.model.conditioning import NoiseEmbedding
from pretrain.model.convolution import kernel_offsets, readable_neighbours
from pretrain.model.dropout import DropoutKey, dropout
from pretrain.model.embedding import TokenEmbedding
from pretrain.model.head import Head, Score
from pretrain.model.layers import no_init, rotary_phases
from pretrain.model.recompute import Keep, Mode, Recompute
from pretrain.model.transformer_layer import TransformerLayer
from pretrain.model.vocab import VocabChunk
from pretrain.vocabulary import TokenSpace


class Transformer(nn.Module):
    """Map from token ids to hidden states, and from hidden states to vocabulary outputs.

    In a pipeline `stage` names the parts that exist on this rank. Names of parameters are those of
    the whole model, and a tied embedding exists on the last stage too.
    """

    def __init__(
        self,
        config: ModelConfig,
        space: TokenSpace,
        topology: Topology,
        stage: Stage | None = None,
        recompute: Recompute | None = None,
        causal: bool = False,
    ) -> None:
        """Build the part of `stage` (None: the whole model). With `causal` short convolutions read
        earlier tokens only."""
        super().__init__()
        self.causal = causal
        self.config, self.space, self.topology = config, space, topology
        self.recompute = Recompute() if recompute is None else recompute
        self.stage = whole_model(config.num_layers) if stage is None else stage
        if self.stage.first or (self.stage.last and config.tie_embeddings):
            self.embedding = TokenEmbedding(
                space.padded_vocab_size,
                config.hidden_size,
                init_method=no_init,
                reduce_scatter_embeddings=topology.sequence_parallel,
                config=parallel_config(topology),
            )
        if self.stage.first and config.time_conditioning:
            self.noise_embedding = NoiseEmbedding()
        self.layers = nn.ModuleList(
            TransformerLayer(config, topology, Keep(self._mode(i) == "selective"), causal)
            if i in self.stage.layers
            else nn.Identity()
            for i in range(config.num_layers)
        )
        if self.stage.last:
            self.head = Head(config, topology, space)

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        rule: AttentionRule | None,
        noise_level: Tensor | None = None,
        carried: tuple[Tensor, ...] = (),
        mix: Tensor | None = None,
        dropout_seed: int | None = None,
        cache: Cache | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Hidden states after the final norm, [s, b, h], for ids [b, s], positions [b or 1, s].

        With mix [b, s, k] ids are [b, s, k], and each input is a weighted sum of embeddings. A
        training pass with dropout needs the `dropout_seed` of its micro-batch; in evaluation
        nothing is dropped. With a `cache` ids are the new tokens of longer sequences, at any
        `positions`; the cache says what they attend to, and `rule` is None.

        `carried` replaces the embeddings as the input of the first layer here. It is also the
        result of every pipeline stage but the last: in a noise-conditioned model the condition
        [b, c], then the hidden states [s, b, h]. These are last, because DeepSpeed runs a backward
        pass for each and keeps the graph until the last one; that of a compiled layer is not kept.
        """
        # On the first stage: (condition [b, c],) x [s, b, h], less with sequence parallelism
        # ([s / tp, b, h]) or context parallelism ([s / cp, b, h]).
        if self.stage.first and not carried:
            carried = self._embed(ids, mix, noise_level)
        *rest, x = carried
        condition = rest[0] if rest else None
        key = self._dropout_key(dropout_seed)
        if self.stage.first:
            x = dropout(x, self.config.dropout, key, "embedding")
        # Shared by all layers: rotary phases of this rank's positions, and the attention plan of
        # whole sequences.
        local = local_positions(positions, 1, self.topology)
        phases = rotary_phases(local, self.config.head_size, self.config.rope_base)
        plan = None if cache is not None else self._plan(rule, x, ids)
        for i in self.stage.layers:
            layer: Callable[..., Tensor] = self.layers[i]
            if self._mode(i) == "full" and torch.is_grad_enabled():
                layer = functools.partial(
                    checkpoint, layer, use_reentrant=False, preserve_rng_state=False
                )
            x = layer(
                x,
                plan,
                phases,
                condition,
                None if key is None else replace(key, layer=i),
                None if cache is None else cache.layer(i),
            )
        if not self.stage.last:
            return (*rest, x)
        hidden: Tensor = self.head.hidden(x, condition)
        if self.topology.sequence_parallel:
            return gather_sequence(hidden, self.topology)
        return gather_positions(hidden, self.topology)

    def _plan(self, rule: AttentionRule | None, x: Tensor, ids: Tensor) -> AttentionPlan:
        """Attention plan of a batch for all layers, for hidden states like x and ids [b, s]."""
        assert rule is not None, "without a cache the pass needs an attention rule"
        call = Call.like(x, self.config.head_size, self.config.attention_dropout)
        plan = plan_attention(rule, self.config.attention, call, *ids.shape[:2])
        if self.config.short_convolution == 0:
            return plan
        offsets = kernel_offsets(self.config.short_convolution, self.causal)
        return replace(plan, neighbours=readable_neighbours(rule, offsets, x))

    def compile_layers(self) -> None:
        """Let torch compile each layer at its first call; modules and their names stay the same."""
        for i in self.stage.layers:
            self.layers[i].compile(dynamic=False)

    def _embed(
        self, ids: Tensor, mix: Tensor | None, noise_level: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Condition [b, c] (in a noise-conditioned model) and hidden states before the first
        layer."""
        if mix is not None:
            mix = local_positions(mix, 1, self.topology)
        x = self.embedding(local_positions(ids, 1, self.topology), mix)
        if not self.topology.sequence_parallel:  # with it x is [s/tp, b, h] already
            x = x.transpose(0, 1).contiguous()
        if not self.config.time_conditioning:
            return (x,)
        if noise_level is None:  # families without a level still have the same parameters
            noise_level = torch.zeros(ids.shape[0], device=ids.device)
        return self.noise_embedding(noise_level), x

    def _dropout_key(self, seed: int | None) -> DropoutKey | None:
        """Key of the dropout masks of this pass on this rank; None where nothing is dropped."""
        drops = self.config.dropout > 0 or self.config.attention_dropout > 0
        if seed is None or not drops or not self.training:
            training = self.training and torch.is_grad_enabled()
            assert not (drops and training), "training with dropout needs a dropout_seed"
            return None
        tensor, context = self.topology.tp_rank, self.topology.cp_rank
        # Without sequence parallelism all tensor-parallel ranks hold the same residual stream.
        residual = tensor if self.topology.sequence_parallel else 0
        return DropoutKey(seed, f"{residual}/{context}", f"{tensor}/{context}")

    def _mode(self, i: int) -> Mode:
        """Mode of recomputation of layer i."""
        return self.recompute.of(i - self.stage.layers.start)

    def vocabulary(self, rows: Tensor) -> VocabChunk:
        """Vocabulary outputs for hidden rows [n, h]."""
        chunk: VocabChunk = self.head(rows, self._tied)
        return chunk

    def score(self, rows: Tensor, score: Score) -> Tensor:
        """Result of `score` on the vocabulary outputs of hidden rows [n, h]."""
        result: Tensor = self.head(rows, self._tied, score)
        return result

    @property
    def _tied(self) -> TokenEmbedding | None:
        return self.embedding if self.config.tie_embeddings else None
