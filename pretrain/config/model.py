"""Settings of what is learned, whatever it runs on: the transformer and the objective."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pretrain.config.types import Fraction, OpenFraction, PositiveInt, Section, Temperature


class ModelConfig(Section):
    """Shape of the transformer; the same one for every objective."""

    num_layers: PositiveInt = 12
    hidden_size: PositiveInt = 768
    num_attention_heads: PositiveInt = 12
    num_query_groups: PositiveInt | None = None
    """Key/value heads (grouped-query attention); null means one for every attention head."""
    ffn_hidden_size: PositiveInt | None = None
    """Width of the MLP; null means 8/3 of `hidden_size`, down to a multiple of 64."""
    activation: Literal["swiglu", "squared_relu", "gelu"] = "swiglu"
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    tie_embeddings: bool = True
    """Share the embedding matrix with the head."""
    time_conditioning: bool = False
    """adaLN modulation by the noise level (uniform-state objectives need it)."""
    rope_base: Annotated[float, Field(gt=0)] = 10000.0
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of initial weights; output projections are scaled by 1/sqrt(2
    num_layers)."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an element of the embeddings and of what attention and MLP add to the
    residual stream, while training."""
    attention_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability of dropping an attention weight, while training."""
    vocab_multiple: PositiveInt = 128
    """The embedding is padded to a multiple of this, whatever the tensor-parallel size."""
    attention: Literal["auto", "sdpa", "flash", "flex"] = "auto"
    """Attention kernel: `flash` (flash-attn, NVIDIA), `sdpa` (torch, everywhere), `flex` (torch's
    FlexAttention, GPU). `auto` takes the fastest that can compute the rule at hand."""

    @model_validator(mode="after")
    def _shape_divides(self) -> ModelConfig:
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


class ObjectiveConfig(Section):
    """What is trained. Families read the fields that concern them and refuse the others."""

    name: str = "autoregressive"
    """A name of the registry, e.g. `autoregressive` or `masked`."""
    time_window: PositiveInt | None = None
    """n: t is stratified over windows of n consecutive positions; null takes the global batch size
    of the first start, which is then recorded here."""
    loss: Literal["elbo", "simple", "dynamic", "cross_entropy"] = "elbo"
    """What is trained; the bound is always evaluated exactly. `elbo` is the exact bound. `simple`:
    masked, block and esoteric take plain cross-entropy on masked tokens, uniform on redrawn tokens,
    interpolating the unweighted bound. For interpolating also `cross_entropy`, which is that of
    noised tokens, and, with hybrid noise, `dynamic`, GIDD's weights."""
    schedule: Literal["linear", "cosine", "log_linear"] = "linear"
    """masked, uniform: share of clean tokens over time."""
    random_length: Fraction = 0.0
    """masked, uniform, interpolating, gaussian: share of sequences cut to a random length while
    training."""
    ar_ratio: Fraction = 0.0
    """masked: share of sequences whose masks are moved to the end of the sequence."""
    noise: Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform", "hybrid"] = (
        "balanced"
    )
    """interpolating: how <mask> and uniform noise mix; `hybrid` is the time form of GIDD."""
    uniform_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """interpolating: p_u, the uniform share of `hybrid` noise at t = 1/2."""
    block_size: PositiveInt = 16
    """block: tokens of a block; 1 is autoregressive, the sequence length masked."""
    clip: tuple[Fraction, Fraction] = (0.0, 1.0)
    """block: interval of noise levels while training; the bound always uses all of them."""
    adapt_clip: bool = False
    """block: at every evaluation move `clip` to the interval of least measured variance."""
    clip_masks: bool = False
    """block: clip the share of a block's tokens that is masked as well, not only the probability of
    masking them, as the published code does."""
    alpha0: Fraction = 1.0
    """esoteric: share of tokens that diffusion fills in; the rest is filled left to right."""
    diffusion_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """esoteric: share of sequences that train the diffusion phase while 0 < alpha0 < 1."""
    orders: PositiveInt = 1
    """autoregressive: number of fixed token orders, drawn by sequence; the first is the text's."""
    order_kind: Literal["local", "random"] = "local"
    """autoregressive: `local` perturbs order i by a normal of i positions, `random` permutes."""
    hide: Literal["none", "queries", "tokens"] = "none"
    """autoregressive: hide past tokens from a query of its own (`queries`), or from all later
    ones (`tokens`)."""
    hide_share: Fraction = 0.25
    """autoregressive: share of positions that `hide` concerns."""
    independent_levels: Fraction = 0.0
    """interpolating: share of sequences in which every token draws its own noise level."""
    curriculum_sequences: Annotated[int, Field(ge=0)] = 0
    """uniform: the first so many sequences of the run are trained with Gaussian-softened inputs."""
    curriculum_temperature: tuple[Temperature, Temperature] = (1e-3, 1e-3)
    """uniform: softmax temperature at the beginning and at the end of the curriculum, log-linear
    between them; towards 0 inputs become tokens again."""
    curriculum_top_k: PositiveInt = 2
    """uniform: embeddings that a softened input is the sum of."""
    curriculum_interval: tuple[OpenFraction, OpenFraction] = (0.05, 0.95)
    """uniform: smallest and largest share of clean tokens (alpha) during the curriculum."""
    embedding_size: PositiveInt = 16
    """gaussian: dimensions of the embeddings that are noised."""
    end_points: tuple[float, float] = (-3.0, 6.0)
    """gaussian: log noise-to-signal ratio at t = 0 and t = 1 before training, which moves both."""
    self_conditioning: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """gaussian: share of sequences that are told the estimate of a first pass while training;
    0 turns self-conditioning off, also in evaluation and sampling."""
    reconstruction_share: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """gaussian: share of sequences that train the reconstruction at t = 0."""
    round_sequences: Annotated[int, Field(ge=0)] = 0
    """distillation: sequences of a round, after which the student becomes the teacher; a multiple
    of the global batch."""
    first_gap: Annotated[float, Field(gt=0, le=1)] = 1 / 512
    """distillation: difference of time between student and teacher in the first round; it doubles
    every round."""
    gap_interval: tuple[OpenFraction, OpenFraction] = (0.006, 0.9987)
    """distillation: smallest and largest share of clean tokens (alpha); time is even in the
    log-SNR of the Gaussian between them."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """distillation: KL(student || teacher), or KL(teacher || student)."""

    @model_validator(mode="after")
    def _intervals_are_ordered(self) -> ObjectiveConfig:
        low, high = self.clip
        if not (low <= high and high > 0):
            raise ValueError(f"objective.clip {self.clip} must be [low, high] with low <= high > 0")
        for name in ("curriculum_interval", "gap_interval"):
            low, high = getattr(self, name)
            if low >= high:
                raise ValueError(
                    f"objective.{name} {(low, high)} must be [low, high] with low < high"
                )
        if not self.end_points[0] < self.end_points[1]:
            raise ValueError(
                f"objective.end_points {self.end_points} must rise: little noise, then much"
            )
        return self
