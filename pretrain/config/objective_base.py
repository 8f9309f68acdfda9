"""Base class of the settings of all families, and their registry."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import PlainValidator, SerializeAsAny

from pretrain.config.registry import Component, Registry
from pretrain.config.types import PositiveInt

if TYPE_CHECKING:
    from pretrain.config.run import Config


@dataclass(frozen=True)
class Layouts:
    """Layouts in which a family can train; every family allows those without a field here."""

    pipeline: bool = True
    context: bool = True
    largest_zero_stage: int = 3
    because: str = ""
    """Reason for the limits: the end of a sentence that begins with the name of the family."""


class ObjectiveConfig(Component):
    """Settings that every family has."""

    layouts: ClassVar[Layouts] = Layouts()
    convolution: ClassVar[Literal["causal", "symmetric", "refused"]] = "symmetric"
    """Neighbours in `model.short_convolution`: the tokens before (`causal`), or as many on both
    sides (`symmetric`). It is `refused` where neighbours in the text are elsewhere in the batch."""
    teacher: ClassVar[bool] = False
    """True where training keeps a frozen second copy of the model."""
    scores_in_chunks: ClassVar[bool] = True
    """False where the loss makes a separate pass over the vocabulary: then it can be neither
    computed in chunks (`train.loss_chunk`) nor compiled (`train.compile_loss`)."""

    time_window: PositiveInt | None = None
    """Number n of consecutive positions over which t is stratified; null takes the global batch
    size of the first start, which is then recorded here."""

    def check(self, config: Config) -> None:
        """Raise ValueError where other sections contradict these settings."""
        parallel, limits = config.parallel, self.layouts
        for name, largest, instead in (
            ("pipeline_parallel_size", 0 if limits.pipeline else 1, "data or tensor parallelism"),
            ("context_parallel_size", 0 if limits.context else 1, "data or tensor parallelism"),
            ("zero_stage", limits.largest_zero_stage, "stage 0, 1 or 2"),
        ):
            given = getattr(parallel, name)
            if 0 < largest < given:
                raise ValueError(
                    f"objective {self.name} {limits.because}, and needs parallel.{name} at most "
                    f"{largest}, not {given}; use {instead}"
                )
        if not self.scores_in_chunks and config.train.loss_chunk:
            raise ValueError(
                f"objective {self.name} scores all rows of a training step at once, so that "
                f"train.loss_chunk is null or 0, not {config.train.loss_chunk}; lower "
                "train.micro_batch_size if memory is short"
            )


objectives: Registry[ObjectiveConfig] = Registry("objective", ObjectiveConfig, "autoregressive")
AnyObjective = Annotated[SerializeAsAny[ObjectiveConfig], PlainValidator(objectives.validate)]
"""Settings of one family, whose class follows from `name`."""


def refuse_unused(settings: Component, names: tuple[str, ...], needed: str) -> None:
    """Raise ValueError if one of `names` is set although it has no effect without `needed`."""
    given = settings.model_dump(exclude_defaults=True).keys()
    for name in names:
        if name in given:
            raise ValueError(
                f"objective.{name} has an effect with {needed}; set that, or leave {name} out"
            )


def refuse_disorder(name: str, interval: tuple[float, float]) -> None:
    """Raise ValueError unless low < high."""
    if interval[0] >= interval[1]:
        raise ValueError(f"objective.{name} {interval} must be [low, high] with low < high")
