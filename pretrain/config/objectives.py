"""Settings of every objective: one class for each family, with its checks and allowed layouts.

Free of torch. A family's mathematics is in `pretrain.objectives`, in the file that `implementation`
names. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from pretrain.config.objective_base import (
    AnyObjective,
    Layouts,
    ObjectiveConfig,
    objectives,
    refuse_disorder,
    refuse_unused,
)
from pretrain.config.types import Fraction, OpenFraction, PositiveInt, Temperature

if TYPE_CHECKING:
    from pretrain.config.run import Config

__all__ = ["AnyObjective", "ObjectiveConfig", "objectives"]

Loss = Literal["elbo", "simple"]
"""`elbo` trains the exact bound; `simple` plain cross-entropy of the noised tokens."""
Schedule = Literal["linear", "cosine", "log_linear"]
"""Noise schedule: the share of clean tokens as a function of time."""


@objectives.register
class AutoregressiveConfig(ObjectiveConfig):
    """Next-token prediction; the two augmentations are off by default."""

    name: Literal["autoregressive"] = "autoregressive"
    implementation: ClassVar[str] = "pretrain.objectives.autoregressive:Autoregressive"
    convolution: ClassVar[Literal["causal", "symmetric", "refused"]] = "causal"

    orders: PositiveInt = 1
    """Number of fixed token orders; each sequence draws one, and the first is that of the text."""
    order_kind: Literal["local", "random"] = "local"
    """`local` perturbs order i by normals of standard deviation i positions, `random` permutes."""
    hide: Literal["none", "queries", "tokens"] = "none"
    """Hide past tokens from some queries (`queries`), or tokens from all later ones (`tokens`)."""
    hide_share: Fraction = 0.25
    """Share of positions to which `hide` applies."""

    def check(self, config: Config) -> None:
        """Refuse reordered sequences where neighbours in the text matter."""
        super().check(config)
        if self.orders > 1 and config.model.short_convolution > 0:
            raise ValueError(
                f"model.short_convolution {config.model.short_convolution} reads a token's "
                f"neighbours in the text, which objective.orders {self.orders} puts elsewhere; set "
                "one of them to 0 or 1"
            )
        if self.orders > 1 and config.data.documents == "masked":
            raise ValueError(
                f"objective.orders {self.orders} reorders whole sequences, but data.documents is "
                "masked; set data.documents to packed, or objective.orders to 1"
            )


@objectives.register
class MaskedConfig(ObjectiveConfig):
    """Absorbing-state diffusion (MDLM, LLaDA)."""

    name: Literal["masked"] = "masked"
    implementation: ClassVar[str] = "pretrain.objectives.masked:Masked"

    loss: Loss = "elbo"
    schedule: Schedule = "linear"
    random_length: Fraction = 0.0
    """Share of sequences truncated to a random length in training."""
    ar_ratio: Fraction = 0.0
    """Share of sequences whose masks are moved to the end of the sequence."""


CURRICULUM = ("curriculum_temperature", "curriculum_top_k", "curriculum_interval")


@objectives.register
class UniformConfig(ObjectiveConfig):
    """Uniform-state diffusion (UDLM, Duo)."""

    name: Literal["uniform"] = "uniform"
    implementation: ClassVar[str] = "pretrain.objectives.uniform:Uniform"

    loss: Loss = "elbo"
    schedule: Schedule = "linear"
    random_length: Fraction = 0.0
    """Share of sequences truncated to a random length in training."""
    curriculum_sequences: Annotated[int, Field(ge=0)] = 0
    """Number of sequences, from the first of the run, that have Gaussian-softened inputs."""
    curriculum_temperature: tuple[Temperature, Temperature] = (1e-3, 1e-3)
    """Softmax temperature at the beginning and at the end of the curriculum, log-linear between
    them; close to 0 the inputs are tokens."""
    curriculum_top_k: PositiveInt = 2
    """Number of embeddings whose weighted sum a softened input is."""
    curriculum_interval: tuple[OpenFraction, OpenFraction] = (0.05, 0.95)
    """Smallest and largest share of clean tokens (alpha) during the curriculum."""

    @model_validator(mode="after")
    def _curriculum_is_complete(self) -> UniformConfig:
        refuse_disorder("curriculum_interval", self.curriculum_interval)
        if self.curriculum_sequences == 0:
            refuse_unused(self, CURRICULUM, "objective.curriculum_sequences above 0")
        elif self.loss != "elbo":
            raise ValueError(
                f"objective.curriculum_sequences needs objective.loss=elbo, given {self.loss}: "
                "the curriculum softens the inputs of the bound"
            )
        return self


@objectives.register
class InterpolatingConfig(ObjectiveConfig):
    """Interpolating diffusion (GIDD): noise between <mask> and uniform."""

    name: Literal["interpolating"] = "interpolating"
    implementation: ClassVar[str] = "pretrain.objectives.interpolating:Interpolating"

    loss: Literal["elbo", "simple", "dynamic", "cross_entropy"] = "elbo"
    """`elbo` is the exact bound, `simple` the unweighted one, `dynamic` has GIDD's weights (hybrid
    noise), `cross_entropy` is that of the noised tokens."""
    noise: Literal["masked", "low_uniform", "balanced", "high_uniform", "uniform", "hybrid"] = (
        "balanced"
    )
    """Mixture of <mask> and uniform noise; `hybrid` is the time form of GIDD."""
    uniform_share: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Uniform share p_u of `hybrid` noise at t = 1/2."""
    independent_levels: Fraction = 0.0
    """Share of sequences in which every token draws a separate noise level."""
    random_length: Fraction = 0.0
    """Share of sequences truncated to a random length in training."""

    @model_validator(mode="after")
    def _hybrid_settings(self) -> InterpolatingConfig:
        if self.noise != "hybrid":
            refuse_unused(self, ("uniform_share",), "objective.noise=hybrid only")
        if self.loss == "dynamic" and self.noise != "hybrid":
            raise ValueError(
                "objective.loss=dynamic is defined for objective.noise=hybrid; "
                f"with noise={self.noise} take loss=simple, cross_entropy or elbo"
            )
        return self

    def check(self, config: Config) -> None:
        """Refuse conditioning on one noise level where each token has a separate one."""
        super().check(config)
        if self.independent_levels > 0 and config.model.time_conditioning:
            raise ValueError(
                f"objective.independent_levels {self.independent_levels} draws a noise level for "
                "each token, but model.time_conditioning true conditions on one for a sequence; "
                "set objective.independent_levels to 0, or model.time_conditioning to false"
            )


@objectives.register
class BlockConfig(ObjectiveConfig):
    """Block diffusion (BD3-LM): left to right over blocks, masked inside a block."""

    name: Literal["block"] = "block"
    implementation: ClassVar[str] = "pretrain.objectives.block:Block"
    convolution: ClassVar[Literal["causal", "symmetric", "refused"]] = "refused"

    loss: Loss = "elbo"
    block_size: PositiveInt = 16
    """Tokens of a block; 1 is autoregressive, the whole sequence is masked diffusion."""
    clip: tuple[Fraction, Fraction] = (0.0, 1.0)
    """Interval of noise levels in training; the evaluated bound always uses all of them."""
    adapt_clip: bool = False
    """Move `clip` to the interval of least measured variance at every evaluation."""
    clip_masks: bool = False
    """Clip also the share of a block's tokens that is masked, not only the probability of masking
    them, as the published code does."""

    @model_validator(mode="after")
    def _interval_is_possible(self) -> BlockConfig:
        low, high = self.clip
        if not (low <= high and high > 0):
            raise ValueError(f"objective.clip {self.clip} must be [low, high] with low <= high > 0")
        return self


@objectives.register
class EsotericConfig(ObjectiveConfig):
    """Eso-LM: a share of the tokens by diffusion, the rest left to right."""

    name: Literal["esoteric"] = "esoteric"
    implementation: ClassVar[str] = "pretrain.objectives.esoteric:Esoteric"
    convolution: ClassVar[Literal["causal", "symmetric", "refused"]] = "refused"

    loss: Loss = "elbo"
    alpha0: Fraction = 1.0
    """Share of tokens that diffusion fills; the rest is filled left to right."""
    diffusion_share: OpenFraction = 0.5
    """Share of sequences that train the diffusion phase where 0 < alpha0 < 1."""

    @model_validator(mode="after")
    def _phases_have_one_scale(self) -> EsotericConfig:
        if self.loss == "simple" and self.alpha0 < 1:
            raise ValueError(
                f"objective.loss=simple needs objective.alpha0=1, not {self.alpha0}: it would put "
                "the two phases on different scales; take objective.loss=elbo"
            )
        return self


@objectives.register
class GaussianConfig(ObjectiveConfig):
    """Gaussian diffusion over learned embeddings with a learned schedule (Plaid)."""

    name: Literal["gaussian"] = "gaussian"
    implementation: ClassVar[str] = "pretrain.objectives.gaussian:Gaussian"
    layouts: ClassVar[Layouts] = Layouts(
        pipeline=False, context=False, because="takes two passes through the whole model"
    )
    scores_in_chunks: ClassVar[bool] = False

    loss: Literal["elbo"] = "elbo"
    random_length: Fraction = 0.0
    """Share of sequences truncated to a random length in training."""
    embedding_size: PositiveInt = 16
    """Number of dimensions of the embeddings that are noised."""
    end_points: tuple[float, float] = (-3.0, 6.0)
    """Initial log noise-to-signal ratio at t = 0 and t = 1; training changes both."""
    self_conditioning: Annotated[float, Field(ge=0, lt=1)] = 0.25
    """Share of sequences that are conditioned on the estimate of a first pass in training; 0 turns
    self-conditioning off, also in evaluation and sampling."""
    reconstruction_share: OpenFraction = 0.125
    """Share of sequences that train the reconstruction at t = 0."""

    @model_validator(mode="after")
    def _noise_rises(self) -> GaussianConfig:
        if not self.end_points[0] < self.end_points[1]:
            raise ValueError(
                f"objective.end_points {self.end_points} must be [low, high] with low < high"
            )
        return self

    def check(self, config: Config) -> None:
        """Refuse an untied head, with which the transformer's embedding would be unused."""
        super().check(config)
        if not config.model.tie_embeddings:
            raise ValueError(
                "objective gaussian replaces the input embeddings, so that model.tie_embeddings "
                "false would leave an unused matrix; set it to true"
            )


@objectives.register
class DistillationConfig(ObjectiveConfig):
    """Discrete consistency distillation of a uniform-state model (Duo)."""

    name: Literal["distillation"] = "distillation"
    implementation: ClassVar[str] = "pretrain.objectives.distillation:Distillation"
    layouts: ClassVar[Layouts] = Layouts(
        pipeline=False,
        context=False,
        largest_zero_stage=2,
        because="has a second model, sharded over ranks as the first",
    )
    teacher: ClassVar[bool] = True

    round_sequences: Annotated[int, Field(ge=0)] = 0
    """Number of sequences of a round, after which the student becomes the teacher; a multiple of
    the global batch size."""
    first_gap: Annotated[float, Field(gt=0, le=1)] = 1 / 512
    """Difference of time between student and teacher in the first round; it doubles every
    round."""
    gap_interval: tuple[OpenFraction, OpenFraction] = (0.006, 0.9987)
    """Smallest and largest share of clean tokens (alpha); between them time is uniform in the
    log-SNR of the Gaussian."""
    divergence: Literal["reverse", "forward"] = "reverse"
    """Direction: `reverse` is KL(student || teacher), `forward` KL(teacher || student)."""

    @model_validator(mode="after")
    def _interval_rises(self) -> DistillationConfig:
        refuse_disorder("gap_interval", self.gap_interval)
        return self

    def check(self, config: Config) -> None:
        """Refuse rounds that are not whole steps."""
        super().check(config)
        rounds, batch = self.round_sequences, config.train.global_batch_size
        if rounds == 0 or rounds % batch:
            raise ValueError(
                f"objective.round_sequences is {rounds}; allowed: a positive multiple of "
                f"train.global_batch_size {batch}; published rounds have 10,000 steps, here "
                f"{10_000 * batch}"
            )
