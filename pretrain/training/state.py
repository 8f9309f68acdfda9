"""How far a run is: a small value that a person can read, saved with every checkpoint."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class TrainState:
    """Progress of the optimizer; everything else of a run is a function of it and the settings."""

    step: int = 0
    """Optimizer steps done."""
    position: int = 0
    """Global sample position of the next sequence."""
    tokens: int = 0
    """Valid token positions processed, repeats counted."""
    flops: float = 0.0
    """Training operations spent, by `pretrain.study.flops`."""
    evaluation_due: bool = False
    """A signal came on a step that asks for an evaluation: the next start makes it first."""

    def advance(self, position: int, tokens: int, flops_per_token: float) -> None:
        """One step that ended at `position` and processed `tokens` valid tokens."""
        self.step += 1
        self.position = position
        self.tokens += tokens
        self.flops += tokens * flops_per_token

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(value: dict[str, Any]) -> TrainState:
        """Read `to_dict`'s form."""
        return TrainState(**value)
