"""Settings of every sampler, as in `epochal sample RUN sampler=NAME sampler.KEY=VALUE`.

Free of torch. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from pretrain.config.registry import Component, Registry


class SamplerConfig(Component):
    """Settings that every sampler has."""

    steps: Annotated[int, Field(ge=1, lt=1 << 16)] | None = None
    """Denoising steps of a sequence; null takes one a token. Autoregressive models always take one
    a token."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Temperature of each draw: 1 samples the model's distribution, 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus: the smallest set of tokens of this probability."""


samplers: Registry[SamplerConfig] = Registry("sampler", SamplerConfig, "ancestral")


@samplers.register
class AncestralConfig(SamplerConfig):
    """Reverse process of the model's family (`Objective.sampler`)."""

    name: Literal["ancestral"] = "ancestral"
    implementation: ClassVar[str] = "pretrain.sampling.sampler:ancestral"

    greedy_tail: bool = False
    """Take the mode in the last step; for families that revise tokens (uniform, distillation,
    interpolating)."""
