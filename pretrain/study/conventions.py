"""Conventions by which papers state training FLOPs, next to the count of `pretrain.study.flops`.

A budget of 1e19 FLOPs is another amount of training under each of them. They differ in the
embeddings, the head, attention, and in whether a masked model is credited for positions that it
does not score. All are per token of the data, so that `convention x tokens` is the budget that the
paper would print.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from pretrain.config.run import ModelConfig
from pretrain.model.size import matrix_parameters, parameter_count
from pretrain.study.flops import forward_parts


@dataclass(frozen=True)
class Training:
    """Properties of an objective on which the operations of a training step depend."""

    causal: bool
    """True where the kernel skips the pairs above the diagonal."""
    head_share: float = 1.0
    """Share of positions that reach the head."""
    positions_per_token: float = 1.0
    extra_passes: float = 0.0
    """Forward passes without gradient in a training step."""


@dataclass(frozen=True)
class Size:
    """Parameters of a model, with and without embeddings."""

    parameters: int
    """All parameters; a tied embedding counts once, rows of padding count."""
    embeddings: int
    """Matrices over the vocabulary: one where tied, else two."""

    @property
    def non_embedding_parameters(self) -> int:
        """Parameters without the matrices over the vocabulary."""
        return self.parameters - self.embeddings


@dataclass(frozen=True)
class Convention:
    """Training FLOPs for one token as one convention counts them."""

    name: str
    """Key in tables: `counted`, `6nd`, ..."""
    flops_per_token: float
    counts: str
    """What is counted."""
    source: str


def model_size(model: ModelConfig, padded_vocab_size: int) -> Size:
    """Parameters with and without embeddings."""
    tables = 1 if model.tie_embeddings else 2
    return Size(
        parameter_count(model, padded_vocab_size), tables * padded_vocab_size * model.hidden_size
    )


def conventions(
    model: ModelConfig, padded_vocab_size: int, seq_length: int, training: Training
) -> list[Convention]:
    """Every convention for one model and objective; the count of this package comes first."""
    counted = forward_parts(
        model,
        padded_vocab_size,
        seq_length,
        causal=training.causal,
        head_share=training.head_share,
        positions_per_token=training.positions_per_token,
    ).times(3.0 + training.extra_passes)
    size = model_size(model, padded_vocab_size)
    pairs = "half of the pairs" if training.causal else "all pairs"
    attention, head = f"attention ({pairs})", f"head ({100 * training.head_share:.0f} % of rows)"
    total, ours = counted.total, "this package"
    rows = (
        ("counted", total, f"layers, {attention}, {head}", ours),
        ("counted_no_attention", total - counted.attention, f"layers, {head}", ours),
        ("counted_no_head", total - counted.head, f"layers, {attention}", ours),
        ("counted_layers", counted.layers, "layers", ours),
        ("6nd", 6.0 * size.parameters, "6 N, embeddings in N", "arXiv 2507.15857"),
        (
            "6nd_no_embeddings",
            6.0 * size.non_embedding_parameters,
            "6 N, N without embeddings",
            "arXiv 2001.08361",
        ),
        (
            "hoffmann",
            hoffmann(model, padded_vocab_size, seq_length),
            "look-up as a matrix, layers, attention (all pairs), softmax, head",
            "arXiv 2203.15556, appendix F",
        ),
        (
            "layers_and_head",
            layers_and_head(model, padded_vocab_size),
            "layers, head",
            "arXiv 2602.15014",
        ),
        (
            "layers_and_attention",
            layers_and_attention(model, seq_length),
            "layers, attention (all pairs)",
            "arXiv 2512.10858",
        ),
    )
    return [Convention(*row) for row in rows]


def hoffmann(model: ModelConfig, vocab_size: int, seq_length: int) -> float:
    """Training FLOPs for one token by appendix F of Hoffmann et al. (arXiv 2203.15556).

    It counts the look-up as a product with one-hot vectors, three operations for each softmax
    weight and all pairs of attention. A gated MLP has three matrices and grouped keys are smaller;
    the paper's models have neither.
    """
    h, s = model.hidden_size, seq_length
    width = model.num_attention_heads * model.head_size
    embeddings = 2.0 * vocab_size * h
    products = 2.0 * matrix_parameters(model)
    logits_and_values = 2.0 * (2.0 * s * width)
    softmax = 3.0 * model.num_attention_heads * s
    attention = model.num_layers * (logits_and_values + softmax)
    head = 2.0 * h * vocab_size
    return 3.0 * (embeddings + products + attention + head)


def layers_and_head(model: ModelConfig, vocab_size: int) -> float:
    """Training FLOPs for one token as arXiv 2602.15014 charges every family.

    It counts linear layers and the head at every position: 6 (12 L d^2 + d V) for its shapes.
    """
    return 6.0 * (matrix_parameters(model) + model.hidden_size * vocab_size)


def layers_and_attention(model: ModelConfig, seq_length: int) -> float:
    """Training FLOPs for one token by arXiv 2512.10858: 6 P + 12 L d s, P parameters of layers."""
    width = model.num_attention_heads * model.head_size
    return 6.0 * matrix_parameters(model) + 12.0 * model.num_layers * width * seq_length


def report(
    model: ModelConfig, padded_vocab_size: int, seq_length: int, training: Training
) -> dict[str, Any]:
    """Sizes and conventions as plain values; `relative` is the ratio to `counted`."""
    rows = conventions(model, padded_vocab_size, seq_length, training)
    size = model_size(model, padded_vocab_size)
    first = rows[0].flops_per_token
    return {
        "parameters": size.parameters,
        "non_embedding_parameters": size.non_embedding_parameters,
        "embedding_parameters": size.embeddings,
        "padded_vocab_size": padded_vocab_size,
        "seq_length": seq_length,
        **asdict(training),
        "conventions": [{**asdict(row), "relative": row.flops_per_token / first} for row in rows],
    }
