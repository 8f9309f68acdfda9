"""Parameter counts of a model configuration, computed without building the model."""

from __future__ import annotations

from pretrain.config.run import ModelConfig

CONDITION, FREQUENCIES = 128, 256
"""Sizes of the conditioning vector and of the sinusoids of a noise level."""
LEVEL_FREQUENCIES = 32
"""Sinusoids of the learned log noise-to-signal ratio, in Gaussian diffusion."""


def matrix_parameters(model: ModelConfig) -> int:
    """Parameters of the matrices of all layers; each is one multiply-add for every token."""
    h, d = model.hidden_size, model.head_size
    qkv = h * (model.num_attention_heads + 2 * model.query_groups) * d
    out = model.num_attention_heads * d * h
    mlp = (3 if model.activation == "swiglu" else 2) * h * model.ffn_size
    return model.num_layers * (qkv + out + mlp)


def convolution_parameters(model: ModelConfig) -> int:
    """Weights of the layers' short convolutions, each a multiply-add for every token."""
    return model.num_layers * 2 * model.short_convolution * model.hidden_size


def parameter_count(model: ModelConfig, padded_vocab_size: int) -> int:
    """Number of parameters of the transformer as it is built."""
    h = model.hidden_size
    norms = model.num_layers * (2 * h + (2 * model.head_size if model.qk_norm else 0)) + h
    embeddings = padded_vocab_size * h * (1 if model.tie_embeddings else 2)
    total = matrix_parameters(model) + convolution_parameters(model) + norms + embeddings
    if model.time_conditioning:
        c = CONDITION
        total += (FREQUENCIES + 1) * c + (c + 1) * c
        total += (c + 1) * h * (6 * model.num_layers + 2)
    return total


def stage_costs(
    model: ModelConfig, padded_vocab_size: int, head_share: float
) -> tuple[list[float], float]:
    """Multiply-adds per token of each layer and of the head, by which stages are balanced."""
    layer = (matrix_parameters(model) + convolution_parameters(model)) / model.num_layers
    return [layer] * model.num_layers, model.hidden_size * padded_vocab_size * head_share
