"""Floating-point operations of the transformer, counted from its matrices and convolutions.

A multiply-add counts two. Attention products are counted (half for causal, whose upper triangle no
kernel needs), elementwise work is not; backward costs twice forward. Other ways of counting are in
`pretrain.study.conventions`.
"""

from __future__ import annotations

from dataclasses import dataclass

from pretrain.config.run import ModelConfig
from pretrain.model.size import convolution_parameters, matrix_parameters


@dataclass(frozen=True)
class Parts:
    """Operations for one token, by the part of the model that does them."""

    layers: float
    """Matrices and short convolutions of all layers."""
    attention: float
    """Products of queries with keys, and of attention weights with values."""
    head: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return self.layers + self.attention + self.head

    def times(self, factor: float) -> Parts:
        """Parts multiplied by `factor`."""
        return Parts(factor * self.layers, factor * self.attention, factor * self.head)


def forward_parts(
    model: ModelConfig,
    padded_vocab_size: int,
    seq_length: int,
    *,
    causal: bool,
    head_share: float = 1.0,
    positions_per_token: float = 1.0,
) -> Parts:
    """Forward operations for one token of a sequence; `head_share` of tokens reach the head.

    Where several positions stand for a token, attention still counts what one of them may read.
    """
    weights = matrix_parameters(model) + convolution_parameters(model)
    readable = (seq_length + 1) / 2 if causal else seq_length
    return Parts(
        layers=2.0 * weights * positions_per_token,
        attention=4.0 * model.num_layers * model.num_attention_heads * model.head_size * readable,
        head=2.0 * model.hidden_size * padded_vocab_size * head_share,
    )


def train_flops_per_token(
    model: ModelConfig,
    padded_vocab_size: int,
    seq_length: int,
    *,
    causal: bool,
    head_share: float = 1.0,
    positions_per_token: float = 1.0,
    extra_passes: float = 0.0,
) -> float:
    """Forward and backward operations for one token; `extra_passes` forward ones beside them."""
    parts = forward_parts(
        model,
        padded_vocab_size,
        seq_length,
        causal=causal,
        head_share=head_share,
        positions_per_token=positions_per_token,
    )
    return (3.0 + extra_passes) * parts.total
