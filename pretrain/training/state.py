"""Progress of a run: a small readable value, saved with every checkpoint."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

_LOSSES = ("lowest_loss", "reference_loss")
"""Fields that may be negative."""


@dataclass
class TrainState:
    """Progress of the optimizer; the rest of a run is a function of it and of the settings."""

    step: int = 0
    """Number of completed optimizer steps."""
    position: int = 0
    """Global sample position of the next sequence."""
    tokens: int = 0
    """Number of processed valid token positions, repeats included."""
    flops: float = 0.0
    """Training operations so far, by `pretrain.study.flops`."""
    evaluation_due: bool = False
    """True where a signal came at a step with an evaluation: the next start makes it first."""
    lowest_loss: float = 0.0
    """Lowest validation loss so far in nats per token; undefined while `lowest_step` is 0."""
    lowest_step: int = 0
    reference_loss: float = 0.0
    """Loss of the latest improvement by more than `train.min_delta`, for `train.patience`."""
    evaluations_without_improvement: int = 0

    def advance(self, position: int, tokens: int, flops_per_token: float) -> None:
        """Count one step that ended at `position` and processed `tokens` valid tokens."""
        self.step += 1
        self.position = position
        self.tokens += tokens
        self.flops += tokens * flops_per_token

    def note_evaluation(self, loss: float, min_delta: float) -> bool:
        """Count an evaluation of the current step; True where its loss is the lowest so far."""
        first = self.lowest_step == 0
        if not math.isfinite(loss):
            self.evaluations_without_improvement += 1
            return False
        if first or loss < self.reference_loss - min_delta:
            self.reference_loss, self.evaluations_without_improvement = loss, 0
        else:
            self.evaluations_without_improvement += 1
        if first or loss < self.lowest_loss:
            self.lowest_loss, self.lowest_step = loss, self.step
            return True
        return False

    def forget_evaluations(self) -> None:
        """Begin the record of evaluations anew: for a branch, whose origin had another schedule."""
        new = TrainState()
        self.lowest_loss, self.lowest_step = new.lowest_loss, new.lowest_step
        self.reference_loss = new.reference_loss
        self.evaluations_without_improvement = new.evaluations_without_improvement

    def to_dict(self) -> dict[str, Any]:
        """State as plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Any) -> TrainState:
        """Read `to_dict`'s form; ValueError names a field that is unknown or malformed."""
        if not isinstance(value, dict):
            raise ValueError(f"train: {type(value).__name__} instead of an object")
        defaults = asdict(TrainState())
        for name, found in value.items():
            if name not in defaults or type(found) is not type(defaults[name]):
                raise ValueError(f"train.{name}: unknown or malformed ({str(found)[:40]})")
            lowest = -math.inf if name in _LOSSES else 0
            if not lowest <= found < math.inf or found == -math.inf:
                raise ValueError(f"train.{name}: {found} is no count")
        return TrainState(**value)


@dataclass(frozen=True)
class Origin:
    """Checkpoint of another run from which a run branched off."""

    path: str
    """Its folder at that time; it may have been removed since."""
    step: int
    position: int
    sha256: str
    """Hash of its manifest."""

    def to_dict(self) -> dict[str, Any]:
        """Origin as plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: Any) -> Origin:
        """Read `to_dict`'s form; ValueError where it is malformed."""
        kinds = {f.name: str if f.type == "str" else int for f in fields(Origin)}
        if not isinstance(value, dict) or value.keys() != kinds.keys():
            raise ValueError(f"origin: not the fields {', '.join(kinds)}")
        for name, kind in kinds.items():
            if type(value[name]) is not kind:
                raise ValueError(f"origin.{name}: malformed ({str(value[name])[:40]})")
        return Origin(**value)
