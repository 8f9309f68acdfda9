"""Settings of the transformer, the same for every objective."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from pretrain.config.types import LayerCount, Section, Width


def _or_zero(value: Any) -> Any:
    return 0 if value is None else value


class ModelConfig(Section):
    """Shape of the transformer, the same for every objective."""

    num_layers: LayerCount = 12
    hidden_size: Width = 768
    num_attention_heads: Width = 12
    num_query_groups: Width | None = None
    """Key-value heads (grouped-query attention); null means one for every attention head."""
    ffn_hidden_size: Width | None = None
    """Width of the MLP; null means 8/3 of `hidden_size`, down to a multiple of 64."""
    activation: Literal["swiglu", "squared_relu", "gelu"] = "swiglu"
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    tie_embeddings: bool = True
    """Share the embedding matrix with the head."""
    time_conditioning: bool = False
    """Condition the model on the noise level by adaLN (uniform-state objectives need it)."""
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2
    num_layers)."""
    parametrization: Literal["standard", "complete_p"] = "standard"
    """Rule by which rates depend on the size: `standard` uses `optimizer.lr` at every size as it
    is; `complete_p` (arXiv 2505.01618) lets a recipe tuned at the base size hold at others."""
    base_hidden_size: Width | None = None
    """Width at which the recipe was tuned; with `complete_p` only."""
    base_num_layers: LayerCount | None = None
    """Depth at which the recipe was tuned; with `complete_p` only."""
    short_convolution: Annotated[int, Field(ge=0), BeforeValidator(_or_zero)] = 0
    """Kernel size of depthwise convolutions over neighbouring tokens, before attention and before
    the MLP; 0 or null means none. They are causal in autoregressive models (published: 4) and
    symmetric in others (5)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of the embeddings, and of the outputs of attention and
    MLP, in training."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an attention weight in training."""
    vocab_multiple: Width = 128
    """The embedding is padded to a multiple of this, whatever the tensor-parallel size."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """Attention kernel: `flash` (flash-attn, NVIDIA), `sdpa` (torch, everywhere), `flex` (torch's
    FlexAttention, GPU). `auto` takes the fastest one that supports the attention rule."""

    @model_validator(mode="after")
    def _shape_divides(self) -> ModelConfig:
        if self.short_convolution == 1:
            raise ValueError(
                "short_convolution 1 reads no neighbour; allowed: 0 (none), or 2 and more "
                "(published: 4 for autoregressive, 5 for the others)"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not divisible by num_attention_heads "
                f"{self.num_attention_heads}"
            )
        if self.head_size % 2:
            raise ValueError(f"head size {self.head_size} is odd; rotary embedding needs pairs")
        if self.num_attention_heads % self.query_groups:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not divisible by "
                f"num_query_groups {self.query_groups}"
            )
        return self

    @model_validator(mode="after")
    def _has_a_base(self) -> ModelConfig:
        base = (self.base_hidden_size, self.base_num_layers)
        if self.parametrization == "complete_p" and None in base:
            raise ValueError(
                "parametrization complete_p needs base_hidden_size and base_num_layers, the width "
                "and depth at which optimizer.* was tuned"
            )
        if self.parametrization == "standard" and base != (None, None):
            raise ValueError(
                "base_hidden_size and base_num_layers have no effect with parametrization "
                "standard; set model.parametrization=complete_p or leave them out"
            )
        return self

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Number of key/value heads."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Width of the MLP with the default filled in."""
        return self.ffn_hidden_size or max(64, 8 * self.hidden_size // 3 // 64 * 64)

    def padded_vocab_size(self, vocab_size: int) -> int:
        """Rows of the embedding for a tokenizer of `vocab_size` ids."""
        return -(-vocab_size // self.vocab_multiple) * self.vocab_multiple
