"""Settings of every optimizer: one class each, and a base class with the common ones.

Free of torch. Adding one is described in docs/extending.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, PlainValidator, SerializeAsAny, model_validator

from pretrain.config.registry import Component, Registry
from pretrain.config.types import Fraction, Momentum, Section

if TYPE_CHECKING:
    from parallel.engine.optimizer import OptimizerSpec


class ScheduleConfig(Section):
    """Schedule of the learning rate, between `optimizer.lr` and `optimizer.min_lr`."""

    name: Literal["constant", "cosine", "wsd"] = "cosine"
    """Rate after the warm-up: constant, cosine to `min_lr`, or constant and a final decay (wsd)."""
    warmup: Annotated[float, Field(ge=0)] = 0.01
    """Length of the warm-up: below 1 a share of all steps, else a number of steps. The first start
    fixes it in sequences; a later change of the batch size or of `data.epochs` leaves it."""
    decay: Fraction = 0.2
    """Share of all steps in which `wsd` lowers the rate to `min_lr`."""


class OptimizerConfig(Component):
    """Settings that every optimizer has; weight decay acts on matrices, not on norms and biases.

    Its implementation is a function of the settings that returns an `OptimizerSpec`.
    """

    lr: Annotated[float, Field(gt=0)] = 3e-4
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """Absolute rate at the end of the decay."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    decay_embeddings: bool = True
    """True where weight decay acts on the embedding matrix too."""
    clip_grad_norm: Annotated[float, Field(ge=0)] = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    schedule: ScheduleConfig = ScheduleConfig()

    def spec(self) -> OptimizerSpec:
        """Declare the optimizer to the engine: its state, and the function that builds it."""
        made: OptimizerSpec = self.load()(self)
        return made

    @model_validator(mode="after")
    def _min_below_peak(self) -> OptimizerConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is larger than lr {self.lr}")
        return self


optimizers: Registry[OptimizerConfig] = Registry("optimizer", OptimizerConfig, "adamw")
AnyOptimizer = Annotated[SerializeAsAny[OptimizerConfig], PlainValidator(optimizers.validate)]
"""Settings of one optimizer, whose class follows from `name`."""


@optimizers.register
class AdamWConfig(OptimizerConfig):
    """AdamW (arXiv 1711.05101)."""

    name: Literal["adamw"] = "adamw"
    implementation: ClassVar[str] = "pretrain.training.adamw:adamw_spec"

    betas: tuple[Momentum, Momentum] = (0.9, 0.95)
    eps: Annotated[float, Field(gt=0)] = 1e-8
